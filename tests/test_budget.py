"""Latency and memory as targets: layers go until what was measured is under the budget, and no further."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainingArguments

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, TrimTrainer, drop_layers, measure_latency
from trimllm_hf.engines.local import LocalEngine
from trimllm_hf.latency.sizes import sizes_of
from trimllm_hf.training.budget import Budget, BudgetState, Footprint, depth_within

STEPS = 12


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def config(**changes: Any) -> TrimConfig:
    settings = {"drop_every": "2", "importance": "last", "repair": "none", "latency_prompt_tokens": 8}
    return TrimConfig(**{**settings, **changes})


def train(folder: Path, trim: TrimConfig, model: Any = None, **changes: Any) -> Trainer:
    model = model or tiny_model()
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=tiny_texts(40), callbacks=[TrimCallback(trim)])
    trainer.train()
    return trainer


def depths(trainer: Trainer) -> list[tuple[int, int]]:
    return [(entry["step"], entry["trim/num_layers"]) for entry in trainer.state.log_history if "trim/num_layers" in entry]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Replaces the measurement by a table of ms by depth, and notes at which depths it was asked."""

    def of(table: dict[int, float]) -> list[int]:
        asked: list[int] = []

        def measure(model: Any, trim: TrimConfig, args: TrainingArguments, without: Any) -> list[float]:
            depth = model.config.num_hidden_layers - len(without)
            asked.append(depth)
            return [table[depth], table[depth] / 10]

        monkeypatch.setattr("trimllm_hf.training.budget._latency_and_memory", measure)
        return asked

    return of


@pytest.mark.parametrize("budget", [{"max_latency_ms": 8.5}, {"max_memory_gb": 0.85}], ids=["latency", "memory"])
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({6: 12, 5: 10, 4: 8, 3: 6, 2: 4}, [(2, 5), (4, 4)]),  # as the straight line between 6 and 2 layers says
        ({6: 12, 5: 8.5, 4: 8, 3: 6, 2: 4}, [(2, 5)]),  # met before the plan is done: 8.5 is not over 8.5
        ({6: 12, 5: 11, 4: 10, 3: 8.6, 2: 4}, [(2, 5), (4, 2)]),  # only further than planned
        ({6: 8, 5: 10, 4: 8, 3: 6, 2: 4}, []),
    ],
    ids=["as planned", "earlier", "further", "nothing to do"],
)
def test_layers_go_until_the_measurement_is_under_the_budget(
    table: dict[int, float], expected: list, budget: dict[str, float], clock, tmp_path: Path
) -> None:
    asked = clock(table)
    trainer = train(tmp_path, config(**budget))
    assert depths(trainer) == expected
    depth = expected[-1][1] if expected else 6
    assert trainer.model.config.num_hidden_layers == len(trainer.model.model.layers) == depth
    assert len(asked) == len(set(asked))  # each depth is measured once
    assert table[depth] <= 8.5 and all(table[deeper] > 8.5 for deeper in range(depth + 1, 7))


@pytest.mark.parametrize("budget", [{"max_latency_ms": 8.5}, {"max_memory_gb": 0.85}], ids=["latency", "memory"])
def test_it_holds_the_weights_of_a_run_that_was_told_the_depth(budget: dict[str, float], clock, tmp_path: Path) -> None:
    clock({6: 12, 5: 10, 4: 8, 3: 6, 2: 4})
    found = train(tmp_path / "budget", config(**budget, importance="block_influence"))
    truth = train(tmp_path / "told", config(target_layers=4, importance="block_influence"))
    assert depths(found) == depths(truth) and found.model.config.trim == truth.model.config.trim
    mine, theirs = found.model.state_dict(), truth.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_target_beside_a_budget_is_how_far_it_may_go(clock, tmp_path: Path) -> None:
    clock({6: 12, 5: 10, 4: 8, 3: 6, 2: 4})
    trainer = train(tmp_path, config(target_layers=4, max_latency_ms=8.0))
    assert depths(trainer)[-1][1] == 4
    with pytest.raises(ValueError, match=r"budget that can be met, got 8 ms \(budget 7.5\) with the 4 layers"):
        train(tmp_path, config(target_layers=4, max_latency_ms=7.5))


def test_a_budget_that_no_depth_can_meet_is_refused(tmp_path: Path) -> None:
    """Really measured: no machine generates a token in a picosecond."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trim = config(max_latency_ms=1e-9, max_memory_gb=64.0)
    said = r"met, got [\d.]+ ms \(budget 1e-09\) and [\d.e-]+ GB \(budget 64\) with the 2 layers that have to stay.*all 6"
    with pytest.raises(ValueError, match=said):
        train(tmp_path, trim, model)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6 and not hasattr(model.config, "trim")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_prompt_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"64 positions that the model has, got 80 tokens. Lower prompt_tokens"):
        train(tmp_path, config(max_latency_ms=1.0, latency_prompt_tokens=64))


def test_the_depth_between_two_measured_ones() -> None:
    def depth(trim: TrimConfig, now: tuple[float, float], least: tuple[float, float]) -> int:
        return depth_within(Footprint(32, *now), Footprint(2, *least), trim)

    both = TrimConfig(max_latency_ms=17.0, max_memory_gb=10.0)
    assert depth(TrimConfig(max_latency_ms=17.0), (32, 99), (2, 1)) == 17
    assert depth(TrimConfig(max_latency_ms=17.9), (32, 99), (2, 1)) == 17
    assert depth(TrimConfig(max_latency_ms=2.0), (32, 99), (2, 1)) == 2
    assert depth(both, (32, 16), (2, 1)) == 17  # memory would allow 20
    assert depth(both, (10, 16), (2, 1)) == 20  # the time is under its budget already
    assert depth(TrimConfig(max_latency_ms=31.9), (32, 99), (2, 1)) == 31
    with pytest.raises(ValueError, match=r"17.5 ms.*with the 2 layers that have to stay"):
        depth(both, (32, 9), (17.5, 1))


def test_memory_as_measured_agrees_with_the_weights(tmp_path: Path) -> None:
    """7 MB a block: the budget is what 4 blocks weigh and half a block for all that is not weights."""
    big = {"hidden_size": 384, "intermediate_size": 1024, "head_dim": 96, "num_key_value_heads": 4}
    model = tiny_model(**big)
    four = sizes_of(tiny_model(**big, num_hidden_layers=4)).weight_bytes
    trim = config(max_memory_gb=(four + 3.5e6) / 1e9)
    trainer = train(tmp_path, trim, model, optim="sgd", max_steps=6)
    assert depths(trainer) == [(2, 5), (4, 4)]
    assert sizes_of(model).weight_bytes == four


@pytest.mark.slow
def test_latency_as_measured_on_this_machine(tmp_path: Path) -> None:
    """The run ends between the ends, with a depth that measured under the budget, and is faster than the base for real."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12}
    model = tiny_model(**shape)
    args = arguments(tmp_path)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()))
    now = Budget(config(max_latency_ms=1.0), engine, args, BudgetState()).footprint(model)
    trim = config(max_latency_ms=now.latency_ms * 0.6, drop_every="1")
    trainer = train(tmp_path, trim, model, optim="sgd")
    callback = next(held for held in trainer.callback_handler.callbacks if isinstance(held, TrimCallback))
    measured = callback.record.budget.measured
    depth = model.config.num_hidden_layers
    assert 2 <= depth < 12 and measured[str(depth)][0] <= trim.max_latency_ms
    assert all(measured[str(deeper)][0] > trim.max_latency_ms for deeper in range(depth + 1, 13) if str(deeper) in measured)
    faster = measure_latency(model, tiny_model(**shape), prompt_tokens=8, new_tokens=8, repeats=6).speedup("decode")
    assert faster is not None and faster.ratio > 1.2


def test_measuring_leaves_the_model_and_the_random_numbers_alone(tmp_path: Path) -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()))
    found = Budget(config(max_latency_ms=1.0), engine, arguments(tmp_path, bf16=True), BudgetState()).footprint(
        model, [1, 2]
    )
    assert found.num_layers == 4 and found.latency_ms > 0 and found.memory_gb > 0
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.config.num_hidden_layers == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_lacks_halves_is_measured_without_them(tmp_path: Path) -> None:
    """An MLP of 4.7 MB in each block, an attention of 2.4 MB: three MLPs have gone, and two more would."""
    model = tiny_model(hidden_size=384, intermediate_size=1024, head_dim=96, num_key_value_heads=4)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()))
    drop_layers(model, [3, 5, 7], "sublayer")
    budget = Budget(config(max_memory_gb=1.0, unit="sublayer"), engine, arguments(tmp_path), BudgetState())
    now, less = budget.footprint(model), budget.footprint(model, [1, 7])
    assert (now.num_layers, less.num_layers) == (9, 7)
    assert now.memory_gb * 1e9 == pytest.approx(sizes_of(model).weight_bytes, abs=1.2e6)
    assert LayerMap.from_config(model.config).num_units("sublayer") == 9
    drop_layers(model, [1, 7], "sublayer")
    assert less.memory_gb * 1e9 == pytest.approx(sizes_of(model).weight_bytes, abs=1.2e6)


def test_a_resumed_run_goes_by_what_was_measured(clock, tmp_path: Path) -> None:
    """On a machine that has become slow it would drop more: the plan and the figures are the checkpoint's."""
    clock({6: 12, 5: 10, 4: 8, 3: 6, 2: 4})
    folder = tmp_path / "run"

    def trainer(folder: Path, **changes: Any) -> TrimTrainer:
        trim = config(max_latency_ms=8.5)
        return TrimTrainer(tiny_model(), arguments(folder, **changes), train_dataset=tiny_texts(40), trim=trim)

    first = trainer(folder, save_strategy="steps", save_steps=3)
    first.train()
    asked = clock({6: 99, 5: 99, 4: 8, 3: 8, 2: 8})
    for step in (3, 6):
        again = trainer(tmp_path / f"again-{step}")
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert again.model.config.num_hidden_layers == 4
        assert all(torch.equal(value, first.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    assert asked == [4]  # new to the run that was killed at 5 layers
    shutil.rmtree(folder)


def test_a_metric_may_stop_a_run_before_its_budget_is_met(clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock({6: 12, 5: 10, 4: 8, 3: 6, 2: 4})
    said: list[str] = []
    monkeypatch.setattr("trimllm_hf.training.budget.logger.warning", said.append)  # the logger of the whole package
    model = tiny_model()
    trainer = TrimTrainer(
        model,
        arguments(tmp_path),
        train_dataset=tiny_texts(40),
        eval_dataset=tiny_texts(8, seed=9),
        compute_metrics=lambda _: {"score": {6: 0.8, 5: 0.8, 4: 0.5}[model.config.num_hidden_layers]},
        trim=config(max_latency_ms=6.0, max_metric_drop=0.1, stop_metric="score"),
    )
    trainer.train()
    assert model.config.num_hidden_layers == 5
    assert said[2:] == ["The budget is not met. The run ends with 5 layers: 10 ms (budget 6)."]
