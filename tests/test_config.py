"""`TrimConfig` and the schedule: round trips, flags, and every refusal with its arithmetic."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from trimllm_hf import TrimConfig
from trimllm_hf.training.schedule import layers_due, plan_drops


def test_json_and_flags_round_trip(tmp_path: Path) -> None:
    config = TrimConfig(target_layers=16, drop_every="50", layers_per_drop=2)
    config.to_json(tmp_path / "trim.json")
    assert TrimConfig.from_json(tmp_path / "trim.json") == config
    flags = ["--target_layers", "16", "--drop_every", "50", "--layers_per_drop", "2"]
    assert HfArgumentParser(TrimConfig).parse_args_into_dataclasses(flags) == (config,)
    assert TrimConfig(target_layers=16, drop_every=50).drop_every == "50"
    assert TrimConfig(max_latency_ms=5).has_budget and not TrimConfig(target_layers=16).has_budget


def test_each_setting_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        HfArgumentParser(TrimConfig).parse_args_into_dataclasses(["--help"])
    assert ended.value.code == 0  # a percent sign in a text would break it
    told = capsys.readouterr().out
    assert all(f"--{each.name}" in told and len(each.metadata["help"]) > 20 for each in fields(TrimConfig))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "exactly one of target_layers"),
        ({"target_layers": 4, "target_ratio": 0.5}, "exactly one of target_layers"),
        ({"target_ratio": 1.0}, "above 0 and below 1, got 1.0"),
        ({"target_layers": 0}, "target_layers to be a whole number of at least 1, got 0"),
        ({"target_layers": 4, "drop_every": "often"}, "got 'often'"),
        ({"target_layers": 4, "drop_every": "0"}, "got '0'"),
        ({"target_layers": 4, "layers_per_drop": 0}, "layers_per_drop"),
        ({"target_layers": 4, "protect_first": -1}, "protect_first"),
        ({"target_layers": 4, "calibration_size": 0}, "calibration_size"),
        ({"target_layers": 4, "unit": "head"}, "got 'head'"),
        ({"target_layers": 4, "healing_ratio": 1.0}, "healing_ratio from 0 up to below 1, got 1.0"),
        ({"target_layers": 4, "max_metric_drop": -0.1}, "max_metric_drop to be a number of at least 0, got -0.1"),
        ({"target_layers": 4, "max_metric_drop": float("nan")}, "at least 0, got nan"),
        ({"target_layers": 4, "max_metric_drop": 0.1, "drop_every": "once"}, "drop_every='once', which drops everything"),
        ({"target_layers": 4, "max_metric_drop": 0.1, "reference_metric": "best"}, "reference_metric to be a number"),
        ({"target_layers": 4, "reference_metric": 0.8}, "max_metric_drop beside reference_metric=0.8"),
        ({"target_layers": 4, "stop_metric": "f1"}, "max_metric_drop beside stop_metric='f1'"),
        ({"target_layers": 4, "distill_weight": 1.5}, "distill_weight from 0 to 1, got 1.5"),
        (
            {"target_layers": 4, "distill_weight": 0.5, "distill_temperature": 0},
            "distill_temperature to be a number",
        ),
        ({"max_latency_ms": 0}, "max_latency_ms to be a number above 0, or None, got 0"),
        ({"max_memory_gb": "8"}, "max_memory_gb to be a number above 0, or None, got '8'"),
        ({"max_latency_ms": 5, "target_layers": 4, "target_ratio": 0.5}, "or a budget"),
        ({"max_latency_ms": 5, "latency_batch_size": 0}, "latency_batch_size to be a whole number of at least 1"),
        ({"max_latency_ms": 5, "latency_prompt_tokens": 0}, "latency_prompt_tokens"),
    ],
)
def test_senseless_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrimConfig(**settings)


def test_the_target_is_a_share_of_the_base() -> None:
    """Of a model that went from 32 to 24 layers before, half is 16: the same as when that run began."""
    assert TrimConfig(target_ratio=0.5).resolve_target(32, 24) == 16
    assert TrimConfig(target_ratio=0.5).resolve_target(5, 5) == 3
    assert TrimConfig(max_latency_ms=5, protect_last=2).resolve_target(32, 32) == 3
    assert TrimConfig(max_latency_ms=5, target_ratio=0.5).resolve_target(32, 32) == 16
    with pytest.raises(ValueError, match=r"got 2 protected layers for a model of 2 layers"):
        TrimConfig(max_latency_ms=5).resolve_target(2, 2)
    with pytest.raises(ValueError, match=r"target_ratio=0.9 of 4 layers, that is 4,.*from 2 to 3"):
        TrimConfig(target_ratio=0.9).resolve_target(4, 4)


@pytest.mark.parametrize("max_steps", [2, 3, 7, 20, 100, 1000])
@pytest.mark.parametrize("layers_per_drop", [1, 3])
def test_spread_drops_everything_in_the_first_quarter(max_steps: int, layers_per_drop: int) -> None:
    config = TrimConfig(target_layers=6, drop_every="spread", layers_per_drop=layers_per_drop)
    plan = plan_drops(config, 12, 6, max_steps)
    assert sum(plan.values()) == 6
    assert 1 <= min(plan) and max(plan) <= max(1, round(0.25 * max_steps)) < max_steps
    if max_steps >= 100:
        assert min(plan) == 0.05 * max_steps and max(plan) == 0.25 * max_steps


@pytest.mark.parametrize("healing_ratio", [0.0, 0.3, 0.6, 0.9])
def test_the_last_share_of_the_steps_heals(healing_ratio: float) -> None:
    plan = plan_drops(TrimConfig(target_layers=6, healing_ratio=healing_ratio), 12, 6, 1000)
    assert sum(plan.values()) == 6 and min(plan) == 50 and max(plan) == min(999, round((1 - healing_ratio) * 1000))
    config = TrimConfig(target_layers=6, drop_every="10", healing_ratio=healing_ratio)
    assert plan_drops(config, 12, 6, 600)[60] == 1
    shortest = round(60 / (1 - healing_ratio)) + 1
    assert max(plan_drops(config, 12, 6, shortest)) == 60
    with pytest.raises(
        ValueError, match=rf"healing_ratio={healing_ratio} of the steps left to heal.*step 60, but.*is the last"
    ):
        plan_drops(config, 12, 6, int(59 / (1 - healing_ratio)))


def test_auto_is_once_unless_something_is_to_happen_before_a_drop() -> None:
    def plan(**settings: Any) -> dict[int, int]:
        return plan_drops(TrimConfig(target_layers=3, **settings), 5, 3, max_steps=100)

    assert plan() == plan(drop_every="once") == {0: 2}
    spread = plan(drop_every="spread")
    assert spread == plan(max_metric_drop=0.1) == {5: 1, 25: 1}
    assert plan(healing_ratio=0.75) == spread


def test_the_published_procedure_by_one_name() -> None:
    config = TrimConfig.published(target_layers=12)
    assert (config.unit, config.score, config.scan_metric) == ("sublayer", "sensitivity", "choice_accuracy")
    assert config.tie_breaker == "activation_norm" and not config.by_budget
    plan = plan_drops(config, 24, 12, max_steps=100)  # one at a time, over the whole run
    assert set(plan.values()) == {1} and len(plan) == 12 and min(plan) == 5 and max(plan) == 99
    sparse = TrimConfig.published(target_layers=6, unit="block", trainable_ratio=0.25)
    assert sparse.resolve_trainable(12) == 3
    with pytest.raises(ValueError, match="unit='block' with trainable_ratio"):
        TrimConfig.published(target_layers=12, trainable_ratio=0.25)


def test_other_schedules() -> None:
    def plan(drop_every: str, layers_per_drop: int = 1) -> dict[int, int]:
        config = TrimConfig(target_layers=2, drop_every=drop_every, layers_per_drop=layers_per_drop)
        return plan_drops(config, 5, 2, max_steps=40, steps_per_epoch=10)

    assert plan("once") == {0: 3}
    assert plan("epoch") == {10: 1, 20: 1, 30: 1}
    assert plan("7") == {7: 1, 14: 1, 21: 1}
    assert plan("7", 2) == {7: 2, 14: 1}
    assert plan_drops(TrimConfig(target_layers=2), 2, 2, 10) == {}


def test_what_is_due_is_what_was_planned_less_what_was_done() -> None:
    plan = {0: 1, 10: 2, 20: 1}
    assert [layers_due(plan, step, 0) for step in (0, 9, 10, 20)] == [1, 1, 3, 4]
    assert layers_due(plan, 10, 1) == 2 and layers_due(plan, 15, 3) == 0 and layers_due(plan, 20, 9) == 0


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "said"),
    [
        (
            {"drop_every": "10"},
            None,
            r"12 - 6 = 6 layers to drop, 1 at a time: 6 drops, every 10 steps.*step 60.*has 60 steps",
        ),
        ({"drop_every": "epoch"}, 20, r"6 drops, every 20 steps.*step 120.*has 60"),
        ({"drop_every": "epoch"}, None, "training set of known length"),
    ],
)
def test_a_plan_that_cannot_reach_its_target_is_refused(settings: dict, steps_per_epoch: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_drops(TrimConfig(target_layers=6, **settings), 12, 6, 60, steps_per_epoch)
