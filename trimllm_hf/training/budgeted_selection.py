"""`importance="auto"`: chooses layers by block influence, and compares sets as far as the selection budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..importance import evaluate_metric, score_layers
from ..importance.calibration import Batch, num_rows
from ..importance.lazy import PassedOver, greedy_layers
from ..importance.order import Chosen, choose, num_gaps, with_fewer_gaps
from ..importance.unigram_baseline import loss_at_unigram_baseline
from ..surgery.adapters import adapters_of, base_of
from .config import TrimConfig
from .dry_run import droppable
from .layer_scorer import LayerScorer
from .repairer import Repairer
from .selection_budget import JUDGED, plan_selection

logger = logging.get_logger("transformers.trimllm_hf")


def choose_within_budget(
    model: PreTrainedModel,
    scorer: LayerScorer,
    count: int,
    config: TrimConfig,
    step: int,
    spared: Sequence[int],
    run_examples: float,
    repairer: Repairer | None,
) -> tuple[Chosen, torch.Tensor]:
    """The layers to drop, and the scores of all layers by block influence.

    Sets of about as little influence in fewer gaps are compared with that of the ranking, by the loss without them. If the
    budget allows a lazy scan as well and it finds yet another set, both are repaired, and the one with the lower held-out
    loss is dropped. While the loss is at chance level only the ranking counts, since a loss would rank noise.

    Args:
        model: The unwrapped model.
        scorer: Holds the calibration examples. If its loss is not the model's own, only block influence is used.
        count: How many layers to choose.
        config: The settings.
        step: Optimizer step, for the log.
        spared: Layers that are chosen only if there are no others.
        run_examples: Number of training examples of the run per selection of layers.
        repairer: Repairs the model for each drop; None: no repair.

    Raises:
        ValueError: If the budget is too small for any selection.
    """
    data, process_group = scorer.needed_data(), scorer.process_group
    batches = data.inputs
    processes: dict[str, Any] = {"process_group": process_group, "filler_batch": data.filler_inputs}
    how: dict[str, Any] = {"part": config.part, **processes}
    examples = sum(process_group.gather(sum(map(num_rows, batches))))
    candidates = droppable(model, config)
    plan = plan_selection(config.selection_budget, run_examples, examples, len(candidates), count)

    def first(number: int) -> list[Batch]:
        """The first examples, that many over all processes together: whole batches, at least one."""
        return list(batches[: max(1, math.ceil(len(batches) * number / examples))])

    logger.info(f"Step {step}: choosing {count} of {len(candidates)} layers by {plan}.")
    seen = {**how, "of_batches": scorer.of_batches}
    scores = score_layers(model, first(plan.examples), "block_influence", config.unit, **seen)
    chosen = choose(scores, count, candidates=candidates, spared=spared)
    if config.unit != "block" or spared or not scorer.own_loss:
        return chosen, scores
    sets = with_fewer_gaps(scores, chosen.positions, candidates)[: plan.sets]
    if not (sets or plan.scanned):
        return chosen, scores
    labelled = batches if plan.scanned else first(JUDGED)
    if config.warm_up_importance != "none" and loss_at_unigram_baseline(model, labelled, **processes):
        return chosen, scores
    passed = PassedOver(model, config.part)

    def losses_without(named: Mapping[str, list[int]], on: Sequence[Batch]) -> dict[str, float]:
        losses = {}
        for name, layers in named.items():
            with passed.without(layers):
                losses[name] = evaluate_metric(model, on, **processes)
        return losses

    def lowest(losses: Mapping[str, float]) -> str:
        winner = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
        told = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
        logger.info(f"Step {step}: chosen by {winner}. Losses on the calibration set: {told}.")
        return winner

    found = chosen.positions
    if sets:
        of_gaps = {f"block influence, {num_gaps(layers)} gap(s)": layers for layers in (found, *sets)}
        found = of_gaps[lowest(losses_without(of_gaps, first(JUDGED)))]
    if plan.scanned:
        greedy = greedy_layers(model, first(plan.scanned), count, candidates=candidates, width=plan.width, **how)
        both = {"block influence": found, "a lazy scan": sorted(greedy.layers)}
        if found == both["a lazy scan"]:
            losses = {"block influence": greedy.cost}
        elif repairer is None or adapters_of(base_of(model)):
            losses = losses_without(both, batches)
        else:  # a repair can change which set is best
            repairs = repairer.fit(model, list(both.values()))
            losses = {name: repairer.evaluate(model, repair).loss for name, repair in zip(both, repairs, strict=True)}
        found = both[lowest(losses)]
    if found == chosen.positions:
        return chosen, scores
    return Chosen(found, [scores[position].item() for position in found], None), scores
