"""`importance="auto"`: chooses layers by block influence, and compares sets as far as the selection budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from ..surgery.drop import plan_drop
from ..surgery.trimmable import TrimmableModel, resolve_model
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
    compared = _Comparison(model, config, step, processes)
    if config.unit != "block" or spared or not scorer.own_loss or not compared.allowed(chosen.positions):
        return chosen, scores
    sets = list(filter(compared.allowed, with_fewer_gaps(scores, chosen.positions, candidates)[: plan.sets]))
    if not (sets or plan.scanned):
        return chosen, scores
    labelled = batches if plan.scanned else first(JUDGED)
    if config.warm_up_importance != "none" and loss_at_unigram_baseline(model, labelled, **processes):
        return chosen, scores
    found = chosen.positions
    if sets:
        by_gaps = {f"block influence, {num_gaps(layers)} gap(s)": layers for layers in (found, *sets)}
        found = by_gaps[compared.lowest(compared.plain(by_gaps, first(JUDGED)))]
    if plan.scanned:
        among: dict[str, Any] = {"candidates": candidates, "width": plan.width, "allowed": compared.allowed}
        scan = greedy_layers(model, first(plan.scanned), count, **among, **how)
        by_score = {"block influence": found, "a lazy scan": sorted(scan.layers)}
        if found != by_score["a lazy scan"] and math.isfinite(scan.cost):
            if repairer is None or adapters_of(base_of(model)):
                losses = compared.plain(by_score, batches)
            else:
                losses = compared.repaired(by_score, repairer)
            found = by_score[compared.lowest(losses)]
    if found == chosen.positions:
        return chosen, scores
    return Chosen(found, [scores[position].item() for position in found], None), scores


@dataclass(frozen=True)
class _Comparison:
    """Compares sets of layers, by name, by the model's loss without them."""

    model: PreTrainedModel
    config: TrimConfig
    step: int
    processes: dict[str, Any]

    def allowed(self, layers: Sequence[int]) -> bool:
        """Whether they can be dropped together: a model whose layers share keys cannot even run without some."""
        try:
            plan_drop(self._target, layers, portable=self.config.portable)
        except ValueError:
            return False
        return True

    def plain(self, sets: Mapping[str, list[int]], batches: Sequence[Batch]) -> dict[str, float]:
        """The losses without each set, on some batches."""
        losses, passed = {}, PassedOver(self.model, self.config.part)
        for name, layers in sets.items():
            with passed.without(layers):
                losses[name] = evaluate_metric(self.model, batches, **self.processes)
        return losses

    def repaired(self, sets: Mapping[str, list[int]], repairer: Repairer) -> dict[str, float]:
        """The held-out losses without each set, repaired: a repair can change which set is best."""
        repairs = repairer.fit(self.model, list(sets.values()))
        return {name: repairer.evaluate(self.model, repair).loss for name, repair in zip(sets, repairs, strict=True)}

    def lowest(self, losses: Mapping[str, float]) -> str:
        """The set of the lowest loss; the log has them all."""
        winner = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
        told = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
        logger.info(f"Step {self.step}: chosen by {winner}. Losses on the calibration set: {told}.")
        return winner

    @cached_property
    def _target(self) -> TrimmableModel:
        return resolve_model(self.model, self.config.part)
