"""What a selection budget affords: never more than it, and the more the larger it is."""

from __future__ import annotations

import copy
import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import TrainingArguments
from transformers.utils import logging

from trimllm_hf import TrimConfig, TrimTrainer, score_layers
from trimllm_hf.importance import evaluate_metric
from trimllm_hf.importance.lazy import PassedOver, greedy_layers
from trimllm_hf.importance.order import choose, num_gaps, with_fewer_gaps
from trimllm_hf.training.selection_budget import RANKED, SETS, STEP, plan_selection

STEPS = (2, 10, 100, 1000, 3000, 10_000, 30_000, 100_000)


def test_what_is_planned_is_affordable() -> None:
    plans = [plan_selection(0.05, 4.0 * steps, 64, 30, 15) for steps in STEPS]
    for plan, steps in zip(plans, STEPS, strict=True):
        assert plan.passes <= plan.affordable == pytest.approx(0.05 * STEP * 4.0 * steps)
    assert [plan.examples for plan in plans[:4]] == [1, 6, 32, 32]
    assert plans[3].scanned == 0 and plans[-1].scanned == 64 and plans[-1].width is None
    assert [plan.passes for plan in plans] == sorted(plan.passes for plan in plans)


def test_by_default_sets_are_compared_in_any_run() -> None:
    plan = plan_selection(None, 8, 64, 30, 15)
    assert (plan.examples, plan.sets, plan.scanned) == (RANKED, SETS, 0) and plan.passes == plan.affordable
    assert plan_selection(None, 8, 64, 30, 1).sets == 0  # one layer is one gap
    assert plan_selection(0.05, 4.0 * 120, 64, 30, 15).sets == 1  # of 72 passes


@pytest.mark.parametrize("seed", range(4))
def test_fewer_gaps_are_the_lowest_of_all_such_sets(seed: int) -> None:
    scores = torch.rand(11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    candidates = [1, 2, 3, 4, 5, 7, 8, 9]  # 6 has to stay
    for count in (2, 4, 6):
        ranked = choose(scores, count, candidates=candidates).positions
        sets = with_fewer_gaps(scores, ranked, candidates)
        every = [list(one) for one in combinations(candidates, count)]
        for found in sets:
            allowed = [one for one in every if num_gaps(one) <= num_gaps(found)]
            assert found == min(allowed, key=lambda one: scores[one].sum().item())
            assert num_gaps(found) < num_gaps(ranked)
        if num_gaps(ranked) > 1 and count <= 5:
            assert num_gaps(sets[-1]) == 1
        assert len(sets) <= 2


def test_the_fewest_gaps_may_be_impossible() -> None:
    """Six of these cannot be one gap, as what has to stay is between them."""
    scores, candidates = torch.arange(9.0), [1, 2, 3, 5, 6, 7]
    assert with_fewer_gaps(scores, candidates, candidates) == []


def test_a_budget_that_affords_nothing_is_refused() -> None:
    said = "0.001 of 20 training examples for each time, of 3 passes each: 0.06 passes. Raise it to 0.017"
    with pytest.raises(ValueError, match=said):
        plan_selection(0.001, 20, 64, 30, 1)
    assert plan_selection(0.0167, 20, 64, 30, 1).examples == 1


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "0.05"])
def test_a_share_is_a_share(share: Any) -> None:
    with pytest.raises(ValueError, match="selection_budget above 0 and up to 1"):
        TrimConfig(target_layers=2, selection_budget=share)


@contextmanager
def telling(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Take down what the package's logger says."""
    logger = logging.get_logger("transformers.trimllm_hf")
    logger.addHandler(caplog.handler)
    logger.setLevel(python_logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(python_logging.NOTSET)


def run(
    folder: Path, budget: float | None, steps: int = 6, layers: int = 6, seed: int = 0, **trim: Any
) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model that was trimmed, by default to three of six layers, its calibration batches, and the model as it was."""
    examples, model = tiny_texts(16, seed=5), tiny_model(num_hidden_layers=layers, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # blocks of unlike influence, in no order
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(torch.rand(1, generator=generator) * 2)
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_strategy="no", use_cpu=True, report_to=[]
    )  # fmt: skip
    common = {"target_layers": 3, "drop_every": "once", "repair": "none"}
    config = TrimConfig(importance="auto", selection_budget=budget, **{**common, **trim})
    trainer = TrimTrainer(model, arguments, trim=config, train_dataset=tiny_texts(), calibration_dataset=examples)
    trainer.train()
    batches = [
        {name: torch.stack([row[name] for row in examples[i : i + 4]]) for name in examples[0]} for i in (0, 4, 8, 12)
    ]
    return trainer.model, batches, before


def test_little_affords_block_influence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with telling(caplog):
        model, batches, before = run(tmp_path, 16 / 72)
    assert "choosing 3 of 4 layers by block influence on 16 examples: about 16 of 16 affordable passes" in caplog.text
    lowest = score_layers(before, batches, "block_influence")[1:-1].argsort()[:3] + 1
    assert model.config.trim["kept_layers"] == [layer for layer in range(6) if layer not in lowest.tolist()]


def test_with_more_the_better_of_two_sets_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever way found it: no set of the audition has a lower loss on what judged."""
    with telling(caplog):
        model, batches, before = run(tmp_path, 1.0, 15, warm_up_importance="none")
    assert "beside a lazy scan" in caplog.text
    kept = model.config.trim["kept_layers"]
    ranked = (score_layers(before, batches, "block_influence")[1:-1].argsort()[:3] + 1).sort().values
    scanned = greedy_layers(before, batches[:2], 3).layers

    def loss(layers: Any) -> float:
        with PassedOver(before).without(layers):
            return evaluate_metric(before, batches)

    gone = [layer for layer in range(6) if layer not in kept]
    sets = [
        ranked.tolist(),
        scanned,
        *with_fewer_gaps(score_layers(before, batches, "block_influence"), ranked.tolist(), range(1, 5)),
    ]
    assert loss(gone) == pytest.approx(min(map(loss, sets)))


def test_the_set_of_the_lowest_loss_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the ranking's and those in fewer gaps, by the loss without them on what compares them."""
    with telling(caplog):
        model, batches, before = run(tmp_path, None, warm_up_importance="none", target_layers=6, layers=12)
    scores = score_layers(before, batches, "block_influence")
    ranked = choose(scores, 6, 1, 1).positions
    sets = [ranked, *with_fewer_gaps(scores, ranked, range(1, 11))]
    losses = []
    for layers in sets:
        with PassedOver(before).without(layers):
            losses.append(evaluate_metric(before, batches))
    best = sets[losses.index(min(losses))]
    assert best != ranked  # or nothing is shown
    assert model.config.trim["kept_layers"] == [layer for layer in range(12) if layer not in best]
    assert f"chosen by block influence, {num_gaps(best)} gap(s)." in caplog.text


def test_one_at_a_time_gets_a_share_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with telling(caplog):
        run(tmp_path, 0.5, drop_every="1")
    assert len({message for message in caplog.messages if "of 12 affordable passes" in message}) == 3


def test_nothing_is_dropped_when_nothing_is_affordable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a selection_budget that affords"):
        run(tmp_path, 0.001)


def test_asking_for_a_metric_or_a_tie_breaker_asks_for_a_scan() -> None:
    auto = TrimConfig(target_layers=2, importance="auto")
    assert auto.by_budget and auto.score == "block_influence"
    for changes in ({"scan_metric": "choice_accuracy"}, {"tie_breaker": "activation_norm"}):
        config = TrimConfig(target_layers=2, importance="auto", **changes)
        assert not config.by_budget and config.score == "sensitivity"
