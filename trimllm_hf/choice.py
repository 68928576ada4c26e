"""Which layer goes next: a run's calibration examples, and the scores by which it chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from .calibration import Batch, calibration_batches, draw, own_randomness
from .config import TrimConfig
from .engines.agreement import Together
from .engines.host import unwrapped
from .importance import needs_data, needs_gradients, score_layers
from .importance.gradient import refuse_frozen
from .stack import find_stack
from .surgery import PlannedDrop, plan_drop

logger = logging.get_logger("transformers.trimllm_hf")


class LayerChoice:
    """Chooses the least important layer of the model as it is at that time.

    Args:
        config: The settings.
        trainer: The Trainer.
        engine: How the processes agree.
        dataloader: The training run's: it tells how examples become batches.
        dataset: The calibration examples; None: drawn from the training set.

    Raises:
        ValueError: If there are no examples, or the score is of gradients and layers are frozen.
    """

    def __init__(self, config: TrimConfig, trainer: Trainer, engine: Together, dataloader: Any, dataset: Any = None) -> None:
        self.config, self.engine = config, engine
        self.batches: list[Batch] = []
        self.stand_in: Batch | None = None  # for a process whose share of the calibration set is empty
        if not needs_data(config.importance):
            return
        if needs_gradients(config.importance):
            refuse_frozen(unwrapped(trainer), config.unit)
        examples = _drawn(config, trainer.train_dataset) if dataset is None else list(dataset)
        collate, columns = dataloader.collate_fn, getattr(dataloader.dataset, "column_names", None)
        with own_randomness(config.calibration_seed):  # a collator may draw
            (self.stand_in,) = calibration_batches(examples[:1], collate, 1, columns)
            self.batches = calibration_batches(
                examples, collate, trainer.args.per_device_train_batch_size, columns, engine.rank, engine.world_size
            )

    def scores(self, model: PreTrainedModel, progress: bool = False) -> torch.Tensor:
        """The scores of the layers, the same on every process, or an error on all."""
        with self._or_none():
            return self._scores(model, progress)

    def next_drop(
        self, model: PreTrainedModel, step: int, progress: bool = False, spared: Sequence[int] = ()
    ) -> PlannedDrop:
        """Score the layers, and plan to drop the least important one; the same on every process, or an error on all.

        Args:
            model: The unwrapped model.
            step: Optimizer step, for the map's history.
            progress: Whether to show a bar.
            spared: Positions of layers that go last.

        Raises:
            ValueError: If the layers cannot be scored, or the guard refuses. Nothing has changed.
        """
        with self._or_none():
            scores = self._scores(model, progress)
            position = least_important(scores, self.config.protect_first, self.config.protect_last, spared)
            drop = plan_drop(
                model,
                [position],
                self.config.unit,
                step=step,
                importance=self.config.importance,
                scores=[scores[position].item()],
                part=self.config.part,
            )
        return drop

    def _scores(self, model: PreTrainedModel, progress: bool) -> torch.Tensor:
        return score_layers(
            model,
            self.batches,
            self.config.importance,
            self.config.unit,
            seed=self.config.calibration_seed + len(find_stack(model, self.config.part)),
            memory_gb=self.config.scan_memory_gb,
            together=self.engine,
            stand_in=self.stand_in,
            progress=progress,
            part=self.config.part,
        )

    @contextmanager
    def _or_none(self) -> Iterator[None]:
        """All processes go on, or none: one must not drop, or wait, alone."""
        try:
            yield
        except Exception as error:
            self.engine.fail(error)
            raise
        self.engine.agree(torch.zeros(1))


def least_important(scores: torch.Tensor, protect_first: int, protect_last: int, spared: Sequence[int] = ()) -> int:
    """Position of the lowest score outside the protected ends; of equal ones, the deepest. Spared ones go last."""
    unprotected = range(protect_first, len(scores) - protect_last)
    candidates = [position for position in unprotected if position not in spared] or unprotected
    return min(candidates, key=lambda position: (scores[position].item(), -position))


def _drawn(config: TrimConfig, dataset: Any) -> list[Any]:
    logger.warning(
        f"TrimCallback scores layers on {config.calibration_size} examples of the training set, which are trained on as "
        "well. Use TrimTrainer, which sets them aside, or pass calibration_dataset."
    )
    if hasattr(dataset, "__len__"):
        size = min(config.calibration_size, len(dataset))
        return [dataset[i] for i in draw(len(dataset), size, config.calibration_seed)]
    return list(islice(iter(dataset), config.calibration_size))
