"""Importance per millisecond: worked out by hand with given times, in a run, and as really measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_drop_choices import BATCHES, CALIBRATION, arguments, history, logged
from test_importance_family import BATCH, DOUBLE, TURN, by_hand_loss, token_accuracy
from tiny import tiny_model, tiny_texts
from torch import nn
from toy import toy_model
from transformers import TrainingArguments

from trimllm_hf import LayerMap, TrimConfig, TrimTrainer, drop_layers, score_layers
from trimllm_hf.engines.process_group import SingleProcess
from trimllm_hf.importance import evaluate_metric, from_compute_metrics, known, per_ms, refuse_not_per_ms
from trimllm_hf.latency.layer_times import measure_layers
from trimllm_hf.training.dry_run import droppable
from trimllm_hf.training.layer_times import ms_of_layers

WHOLE = by_hand_loss(2, 1)  # of the toy with all its blocks: a turn, the identity, a doubling, a turn
WITHOUT = [by_hand_loss(2, 0), WHOLE, by_hand_loss(1, 1), by_hand_loss(2, 0)]
CAN_BE = {"sensitivity", "perplexity", "block_influence", "relative_magnitude", "taylor"}
MS = [16.0, 1.0, 0.25, 2.0]  # the first turn is slow, the doubling is fast


def close(scores: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_a_scan_per_ms_by_hand() -> None:
    scores = score_layers(toy_model(), [BATCH], unit_ms=MS)
    close(scores, [(loss - WHOLE) / ms for loss, ms in zip(WITHOUT, MS, strict=True)])
    # a turn costs more than the doubling, and 64 times the time makes it the cheaper one
    assert WITHOUT[TURN] > WITHOUT[DOUBLE] and scores[TURN] < scores[DOUBLE]
    alike = score_layers(toy_model(), [BATCH], unit_ms=[0.7] * 4)
    assert alike.argsort(stable=True).tolist() == score_layers(toy_model(), [BATCH]).argsort(stable=True).tolist()


def test_other_scores_per_ms_by_hand() -> None:
    of_perplexity = [math.exp(loss) - math.exp(WHOLE) for loss in WITHOUT]
    close(
        score_layers(toy_model(), [BATCH], "perplexity", unit_ms=MS),
        [x / ms for x, ms in zip(of_perplexity, MS, strict=True)],
    )
    for name, plain in (("block_influence", [1, 0, 0, 1]), ("relative_magnitude", [math.sqrt(2), 0, 1 / 2, math.sqrt(2)])):
        scores = score_layers(toy_model(), [BATCH], name, unit_ms=MS)
        close(scores, [x / ms for x, ms in zip(plain, MS, strict=True)])
    slope = 2 * (1 - (math.exp(2) - math.exp(-2)) / (math.exp(2) + math.exp(-2) + 2))
    close(score_layers(toy_model(), [BATCH], "taylor", unit_ms=MS), [slope / ms for ms in MS])


def test_an_accuracy_falls_and_what_changes_nothing_ties() -> None:
    """With its blocks the toy is always right; without a turn never, for the first token wins a tie of logits."""
    metric = from_compute_metrics("accuracy", token_accuracy, lambda logits, labels: logits.argmax(-1))
    whole = evaluate_metric(toy_model(), [BATCH], metric)
    plain = score_layers(toy_model(), [BATCH], metric=metric)
    scores = score_layers(toy_model(), [BATCH], metric=metric, unit_ms=MS)
    assert whole == 1 and plain[TURN] > -1
    close(scores, [(score + 1) / ms for score, ms in zip(plain.tolist(), MS, strict=True)])
    assert scores[[1, 2]].tolist() == [0, 0]  # a tie for the tie breaker


def test_what_the_model_is_better_without_goes_first_and_the_slower_the_sooner() -> None:
    scores = per_ms(torch.tensor([3.0, 1.0, 0.5, 0.5], dtype=torch.float64), 1.0, [4.0, 9.0, 1.0, 3.0])
    assert scores.tolist() == [0.5, 0, -0.5, -1.5]


@pytest.mark.parametrize("name", sorted({*known()} - CAN_BE))
def test_a_score_that_only_ranks_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"'block_influence'.*for importance_per_ms.*got '{name}'.*only rank"):
        score_layers(toy_model(), [BATCH], name, unit_ms=MS)
    for setting in ("importance", "warm_up_importance"):
        trim = TrimConfig(target_layers=3, importance_per_ms=True, **{setting: name})
        with pytest.raises(ValueError, match=rf"for importance_per_ms.*got '{name}'"):
            TrimTrainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), trim=trim)


def test_those_that_are_not_refused() -> None:
    refuse_not_per_ms(*CAN_BE)


@pytest.mark.parametrize("ms", [MS[:3], [1.0, 0.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]])
def test_times_that_are_none_are_refused(ms: list[float]) -> None:
    with pytest.raises(ValueError, match="a time above 0 ms for each of 4 layers, got"):
        score_layers(toy_model(), [BATCH], "block_influence", unit_ms=ms)


# ---- in a run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[int]]:
    """Gives a run times of attention and MLP, and counts how often it asks."""

    def of(attention: float, mlp: float) -> list[int]:
        asked: list[int] = []

        def fake(twin: Any, unit: str, **settings: Any) -> list[float]:
            asked.append(settings["prompt_tokens"])
            sublayers = LayerMap.from_config(twin.config).sublayers
            return [attention if half == "attention" else mlp for _, half in sublayers]

        monkeypatch.setattr("trimllm_hf.training.run.ms_of_layers", lambda *given: ms_of_layers(*given, measure=fake))
        return asked

    return of


def trainer(folder: Path, of_arguments: Any = None, **trim: Any) -> TrimTrainer:
    settings = {"unit": "sublayer", "target_layers": 9, "drop_every": "once", "warm_up_importance": "none", "repair": "none"}
    config = TrimConfig(
        **{**settings, "importance": "sensitivity", "importance_per_ms": True, "latency_prompt_tokens": 16, **trim}
    )
    args: TrainingArguments = arguments(folder, **(of_arguments or {}))
    return TrimTrainer(tiny_model(), args, train_dataset=tiny_texts(), trim=config, calibration_dataset=CALIBRATION)


@pytest.mark.parametrize(("attention", "mlp"), [(1.0, 8.0), (8.0, 1.0)])
def test_a_run_drops_what_costs_least_for_each_ms(attention: float, mlp: float, clock: Any, tmp_path: Path) -> None:
    asked = clock(attention, mlp)
    run = trainer(tmp_path)
    run.train()
    assert asked == [16]  # once, whatever is dropped
    model, config = tiny_model(), TrimConfig(target_layers=9, unit="sublayer")
    (entry,) = logged(run)  # the record of the first step tells of the last drop
    for record in history(run):
        names = LayerMap.from_config(model.config).sublayers
        harm = score_layers(model, BATCHES, unit="sublayer") - evaluate_metric(model, BATCHES)
        costs = {
            position: harm[position].item() * ms if harm[position] < 0 else harm[position].item() / ms
            for position in droppable(model, config)
            for ms in [attention if names[position][1] == "attention" else mlp]
        }
        lowest = min(costs, key=lambda position: costs[position])
        assert (record["dropped"][0], record["sublayers"][0]) == names[lowest]
        assert record["importance"] == "sensitivity per ms"
        assert record["scores"] == [pytest.approx(costs[lowest], rel=1e-4)]
        margin = sorted(costs.values())[1] - costs[lowest]
        drop_layers(model, [lowest], "sublayer")
    assert entry["trim/margin"] == pytest.approx(margin, rel=1e-3)


@pytest.mark.slow
def test_the_times_decide(clock: Any, tmp_path: Path) -> None:
    """Where attentions take long they go; where MLPs do, MLPs."""
    gone = {}
    for slow, times in (("attention", (1e4, 1.0)), ("mlp", (1.0, 1e4))):
        clock(*times)
        run = trainer(tmp_path, importance="block_influence")
        run.train()
        gone[slow] = {half for record in history(run) for half in record["sublayers"]}
    assert gone == {"attention": {"attention"}, "mlp": {"mlp"}}


def test_taylor_by_the_gradients_of_the_step_is_per_ms_as_well(clock: Any, tmp_path: Path) -> None:
    scores = {}
    for mlp in (1.0, 1e6):
        clock(1.0, mlp)
        run = trainer(tmp_path, importance="taylor", drop_every="2", target_layers=11)
        run.train()
        (record,) = history(run)
        scores[mlp] = record["scores"][0]
        assert record["importance"] == "taylor per ms"
    assert 0 < scores[1e6] < scores[1.0] / 1e3 and record["sublayers"] == ["mlp"]


def test_a_resumed_run_goes_by_the_times_that_it_began_with(clock: Any, tmp_path: Path) -> None:
    clock(8.0, 1.0)
    settings: dict[str, Any] = {"drop_every": "2", "layers_per_drop": 2, "healing_ratio": 0}
    first = trainer(tmp_path / "run", {"save_strategy": "steps", "save_steps": 3}, **settings)
    first.train()
    asked = clock(1.0, 8.0)
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert asked == [] and len(history(first)) > 1 and history(again) == history(first)


def test_without_it_no_time_is_measured(clock: Any, tmp_path: Path) -> None:
    asked = clock(1.0, 8.0)
    run = trainer(tmp_path, importance_per_ms=False)
    run.train()
    assert asked == [] and {record["importance"] for record in history(run)} == {"sensitivity"}


# ---- as measured


def test_with_blocks_that_are_alike_the_order_stays(tmp_path: Path) -> None:
    dropped = []
    for per in (True, False):
        run = trainer(tmp_path, unit="block", target_layers=3, importance_per_ms=per)
        run.train()
        dropped.append([record["dropped"] for record in history(run)])
    assert dropped[0] == dropped[1]


def test_layers_that_are_built_alike_get_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a weight moves on by a second."""
    clock, forward = [0], nn.Linear.forward

    def counted(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        clock[0] += self.weight.numel()
        return forward(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr("trimllm_hf.latency.layer_times.timer", lambda: clock[0])
    model = tiny_model(hidden_size=64, intermediate_size=64 * 64, num_hidden_layers=4).train()
    drop_layers(model, [3], "sublayer")
    before, state = [dict(vars(module)) for module in model.modules()], torch.get_rng_state()
    ms = measure_layers(model, "sublayer", prompt_tokens=8)
    block = model.model.layers[0]
    attention, mlp = (1e3 * sum(p.numel() for p in half.parameters()) for half in (block.self_attn, block.mlp))
    assert ms == [attention, mlp, attention, attention, mlp, attention, mlp]
    assert [dict(vars(module)).keys() for module in model.modules()] == [each.keys() for each in before]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_blocks_of_a_model_that_does_not_generate() -> None:
    ms = measure_layers(tiny_model("bert"), "block", prompt_tokens=8)
    assert len(ms) == 6 and len(set(ms)) == 1 and ms[0] > 0


def test_a_prompt_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"64 positions that the model has, got 80 tokens. Lower prompt_tokens"):
        trainer(tmp_path, latency_prompt_tokens=64).train()


def test_only_the_main_process_measures_and_an_error_there_is_everyones(tmp_path: Path) -> None:
    class Second(SingleProcess):
        rank, world_size = 1, 2

        def all_reduce(self, total: torch.Tensor) -> torch.Tensor:
            return total + torch.arange(1.0, 13.0, dtype=torch.float64)  # what the main process has measured

    class First(SingleProcess):
        told: Exception | None = None

        def raise_on_all(self, error: Exception) -> None:
            self.told = error

    def never(*_: Any, **__: Any) -> list[float]:
        raise RuntimeError("no clock")

    config = TrimConfig(target_layers=9, unit="sublayer", importance_per_ms=True)
    model: nn.Module = tiny_model()
    found = ms_of_layers(model, config, Second(), arguments(tmp_path), measure=never)
    assert list(found.values()) == list(range(1, 13)) and list(found)[:2] == ["attention 0", "mlp 0"]
    first = First()
    with pytest.raises(RuntimeError, match="no clock"):
        ms_of_layers(model, config, first, arguments(tmp_path), measure=never)
    assert isinstance(first.told, RuntimeError)
