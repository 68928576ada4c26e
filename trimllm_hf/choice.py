"""Which layer goes next: a run's calibration examples, the scores by which it chooses, and a rehearsal of its plan.

Most architectures allow any layer to go. Some tie a property to a layer's place (the only attention of a hybrid, the first
block of T5), and some repeat a pattern that their config cannot write out: there only a whole period can go, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from .adapters import adapters_of, base_of
from .calibration import Batch, calibration_batches, draw, own_randomness
from .config import TrimConfig
from .engines import Engine
from .guard import rebuild
from .importance import needs_data, score_layers
from .stack import find_stack
from .surgery import PlannedDrop, plan_drop

logger = logging.get_logger("transformers.trimllm_hf")

Planner = Callable[[list[int]], PlannedDrop]  # plans a drop of some positions, or raises a ValueError


class LayerChoice:
    """Chooses the least important layer of the model as it is at that time.

    Args:
        config: The settings.
        trainer: The Trainer.
        engine: How the processes agree.
        dataloader: The training run's: it tells how examples become batches.
        dataset: The calibration examples; None: drawn from the training set.
        sizes: For each depth, how many layers have to go at once: what `rehearse` found.

    Raises:
        ValueError: If there are no examples.
    """

    def __init__(
        self,
        config: TrimConfig,
        trainer: Trainer,
        engine: Engine,
        dataloader: Any,
        dataset: Any = None,
        sizes: dict[int, int] | None = None,
    ) -> None:
        self.config, self.engine, self.sizes = config, engine, sizes or {}
        self.batches: list[Batch] = []
        self.stand_in: Batch | None = None  # for a process whose share of the calibration set is empty
        if not needs_data(config.importance):
            return
        examples = _drawn(config, trainer.train_dataset) if dataset is None else list(dataset)
        collate, columns = dataloader.collate_fn, getattr(dataloader.dataset, "column_names", None)
        with own_randomness(config.calibration_seed):  # a collator may draw
            (self.stand_in,) = calibration_batches(examples[:1], collate, 1, columns)
            self.batches = calibration_batches(
                examples, collate, trainer.args.per_device_train_batch_size, columns, engine.rank, engine.world_size
            )

    def next_drop(self, model: PreTrainedModel, step: int, progress: bool = False) -> PlannedDrop:
        """Score the layers, and plan to drop the least important one; the same on every process, or an error on all.

        A few that lie next to one another, where the guard allows no layer to go alone.

        Args:
            model: The unwrapped model.
            step: Optimizer step, for the map's history.
            progress: Whether to show a bar.

        Raises:
            ValueError: If the layers cannot be scored, or the guard refuses. Nothing has changed.
        """
        depth = len(find_stack(model, self.config.part))
        size = self.sizes.get(depth, 1)
        try:
            scores = score_layers(
                model,
                self.batches,
                self.config.importance,
                self.config.unit,
                seed=self.config.calibration_seed + depth,
                memory_gb=self.config.scan_memory_gb,
                together=self.engine,
                stand_in=self.stand_in,
                progress=progress,
                part=self.config.part,
            )
            drop = least_important(
                lambda positions: plan_drop(
                    model,
                    positions,
                    self.config.unit,
                    step=step,
                    importance=self.config.importance,
                    scores=scores[positions].tolist(),
                    part=self.config.part,
                ),
                {position: scores[position].item() for position in unprotected(self.config, depth)},
                size,
                size,
            )
        except Exception as error:  # one process must not drop, or wait, alone
            self.engine.fail(error)
            raise
        self.engine.agree(torch.zeros(1))  # nobody failed: all of them drop
        return drop


def least_important(plan: Planner, scores: Mapping[int, float], most: int, usual: int = 1) -> PlannedDrop:
    """Plan the drop of the least important layer that may go; where none may, of a few that lie next to one another.

    Args:
        plan: Plans a drop of some positions, or raises a ValueError.
        scores: The scores of the positions that are not protected; of equal ones the deepest goes first.
        most: How many layers may go at once.
        usual: How many had to go at once before: tried first.

    Raises:
        ValueError: If nothing can be dropped; what was said of the least important layer.
    """
    refusal: ValueError | None = None
    for size in sorted(range(1, most + 1), key=lambda size: (size != usual, size)):
        runs = [[*range(first, first + size)] for first in scores]
        possible = [run for run in runs if all(position in scores for position in run)]
        for run in sorted(possible, key=lambda run: (sum(scores[position] for position in run), -run[0])):
            try:
                return plan(run)
            except ValueError as error:
                refusal = refusal or error
    raise refusal or ValueError(f"Expected layers that may go, got only protected ones beside {sorted(scores)}.")


def unprotected(config: TrimConfig, depth: int) -> range:
    """The positions that may go, as far as the settings say."""
    return range(config.protect_first, depth - config.protect_last)


def rehearse(model: nn.Module, target: int, config: TrimConfig) -> dict[int, int]:
    """Drop layers of a copy without memory until it has `target` of them.

    Args:
        model: The model, which stays as it is.
        target: The depth to reach.
        config: The settings.

    Returns:
        For each depth on the way, how many layers have to go at once.

    Raises:
        ValueError: If there is no way to the target; with the least depth that can be reached.
    """
    base, part = base_of(model), config.part
    copy: Any = rebuild(base, {}, part, adapters_of(base))
    sizes: dict[int, int] = {}
    size = 1
    while (depth := len(find_stack(copy, part))) > target:
        deepest_first = {position: -float(position) for position in unprotected(config, depth)}
        try:
            drop = least_important(
                lambda layers: plan_drop(copy, layers, config.unit, part=part), deepest_first, depth - target, size
            )
        except ValueError as error:
            reached = f"It can be trimmed to {depth}; then: " if sizes else ""
            raise ValueError(
                f"Expected a target that {type(base).__name__} can be trimmed to, got {target} layers. {reached}{error}"
            ) from error
        size = sizes[depth] = len(drop.positions)
        drop.apply()
    return sizes


def _drawn(config: TrimConfig, dataset: Any) -> list[Any]:
    logger.warning(
        f"TrimCallback scores layers on {config.calibration_size} examples of the training set, which are trained on as "
        "well. Use TrimTrainer, which sets them aside, or pass calibration_dataset."
    )
    if hasattr(dataset, "__len__"):
        size = min(config.calibration_size, len(dataset))
        return [dataset[i] for i in draw(len(dataset), size, config.calibration_seed)]
    return list(islice(iter(dataset), config.calibration_size))
