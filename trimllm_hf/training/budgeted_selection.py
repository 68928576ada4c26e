"""`importance="auto"`: chooses layers by block influence, and by a lazy scan if the selection budget allows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..importance import evaluate_metric, score_layers
from ..importance.calibration import Batch, num_rows
from ..importance.lazy import PassedOver, greedy_layers
from ..importance.order import Chosen, choose
from ..importance.unigram_baseline import loss_at_unigram_baseline
from ..surgery.adapters import adapters_of, base_of
from .config import TrimConfig
from .dry_run import droppable
from .layer_scorer import LayerScorer
from .repairer import Repairer
from .selection_budget import plan_selection

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

    If the budget allows a lazy scan and it finds a different set, the set whose removal gives the lower held-out loss is
    dropped. A scan while the loss is at chance level would rank noise.

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
    if not plan.scanned or config.unit != "block" or spared or not scorer.own_loss:
        return chosen, scores
    if config.warm_up_importance != "none" and loss_at_unigram_baseline(model, batches, **processes):
        return chosen, scores
    found = greedy_layers(model, first(plan.scanned), count, candidates=candidates, width=plan.width, **how)
    if sorted(found.layers) == chosen.positions:
        return chosen, scores
    sets = {"block influence": chosen.positions, "a lazy scan": sorted(found.layers)}
    if repairer is None or adapters_of(base_of(model)):
        passed, losses = PassedOver(model, config.part), {}
        for name, layers in sets.items():
            with passed.without(layers):
                losses[name] = evaluate_metric(model, batches, **processes)
    else:  # a repair can change which set is best
        repairs = repairer.fit(model, list(sets.values()))
        losses = {name: repairer.evaluate(model, repair).loss for name, repair in zip(sets, repairs, strict=True)}
    winner = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
    told = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
    logger.info(f"Step {step}: chosen by {winner}. Losses on the calibration set: {told}.")
    return Chosen(sets[winner], [scores[position].item() for position in sets[winner]], None), scores
