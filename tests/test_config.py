"""`TrimConfig` and the schedule: round trips, flags, and every refusal with its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import HfArgumentParser

from trimllm_hf import TrimConfig
from trimllm_hf.schedule import layers_due, plan_drops


def test_json_and_flags_round_trip(tmp_path: Path) -> None:
    config = TrimConfig(target_layers=16, drop_every="50", layers_per_drop=2)
    config.to_json(tmp_path / "trim.json")
    assert TrimConfig.from_json(tmp_path / "trim.json") == config
    flags = ["--target_layers", "16", "--drop_every", "50", "--layers_per_drop", "2"]
    assert HfArgumentParser(TrimConfig).parse_args_into_dataclasses(flags) == (config,)
    assert TrimConfig(target_layers=16, drop_every=50).drop_every == "50"


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
    ],
)
def test_senseless_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrimConfig(**settings)


def test_the_target_is_a_share_of_the_base() -> None:
    """Of a model that went from 32 to 24 layers before, half is 16: the same as when that run began."""
    assert TrimConfig(target_ratio=0.5).resolve_target(32, 24) == 16
    assert TrimConfig(target_ratio=0.5).resolve_target(5, 5) == 3
    with pytest.raises(ValueError, match=r"target_ratio=0.9 of 4 layers, that is 4,.*from 2 to 3"):
        TrimConfig(target_ratio=0.9).resolve_target(4, 4)


@pytest.mark.parametrize("max_steps", [2, 3, 7, 20, 100, 1000])
@pytest.mark.parametrize("layers_per_drop", [1, 3])
def test_auto_drops_everything_in_the_first_quarter(max_steps: int, layers_per_drop: int) -> None:
    plan = plan_drops(TrimConfig(target_layers=6, layers_per_drop=layers_per_drop), 12, 6, max_steps)
    assert sum(plan.values()) == 6
    assert 1 <= min(plan) and max(plan) <= max(1, round(0.25 * max_steps)) < max_steps
    if max_steps >= 100:
        assert min(plan) == 0.05 * max_steps and max(plan) == 0.25 * max_steps


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
