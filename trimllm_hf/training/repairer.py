"""The repairs in a run: chooses the examples to fit them on, and checks that each lowers the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..engines import ProcessGroup, all_or_none
from ..importance.calibration import Batch, draw
from ..importance.statistics import real_tokens
from ..layer_map import LayerMap
from ..surgery.adapters import adapters_of, base_of
from ..surgery.blocks import find_blocks
from ..surgery.drop import PlannedDrop
from ..surgery.repair import INFINITE, Repair, places
from ..surgery.repair.output_projection import is_linear, shape_of
from ..utils import isolated_rng
from .config import TrimConfig
from .repair import RepairReport, evaluate_repair, fit, refuse_adapters, refuse_without_refits
from .selection_budget import JUDGED
from .trainer_batches import TrainerBatches
from .trainer_hooks import train_batch_size, unwrapped

logger = logging.get_logger("transformers.trimllm_hf")

TOKENS = 4  # per unit of the MLP's width: a width of 1,536 needs 6,144 tokens, 64 examples of 96


class Repairer:
    """Fits a repair for each drop of a run on training examples, and evaluates it on the calibration set.

    Args:
        config: The settings.
        trainer: The Trainer.
        process_group: The processes of the run.
        dataloader: The training data loader, which defines how examples become batches.
        dataset: The calibration examples; None: drawn from the training set, as for scoring layers.
    """

    def __init__(
        self, config: TrimConfig, trainer: Trainer, process_group: ProcessGroup, dataloader: Any, dataset: Any = None
    ) -> None:
        self.config, self.process_group = config, process_group
        self._trainer, self._dataloader = trainer, dataloader
        self._batch_size = train_batch_size(trainer)
        calibration, self._rest = _examples(config, trainer.train_dataset, dataset)
        calibration = calibration[: max(JUDGED, process_group.world_size)]
        with isolated_rng(config.calibration_seed):  # a collator may use random numbers
            held_out = self._batches(calibration)
            self._filler_batch, self._held_out = held_out.filler_inputs, held_out.inputs
        self._to_fit: list[Batch] = []

    def check(self, model: PreTrainedModel) -> None:
        """If a repair is required, refuse a model that cannot be repaired, before the first step.

        Raises:
            ValueError: If the model has adapters, or no block has a place for a repair.
        """
        if self.config.repair != "required":
            return
        with all_or_none(self.process_group):
            refuse_adapters(model)
            every_other = range(1, len(places(model, self.config.unit, self.config.part)), 2)
            (repair,) = self.fit(model, [every_other], penalty=math.inf)  # only the probe
            if INFINITE not in repair.unrepaired.values():
                refuse_without_refits(repair)

    def fit(self, model: PreTrainedModel, candidates: Sequence[Sequence[int]], penalty: float | None = None) -> list[Repair]:
        """Fit the repairs for candidate sets of layers, by their positions in the unit."""
        config = self.config
        self._to_fit = self._to_fit or self._enough(model)
        how: dict[str, Any] = {"process_group": self.process_group, "filler_batch": self._filler_batch}
        return fit(model, candidates, self._to_fit, config.unit, penalty=penalty, part=config.part, **how)

    def evaluate(self, model: PreTrainedModel, repair: Repair) -> RepairReport:
        """The held-out loss with a repair and without."""
        return evaluate_repair(
            model, repair, self._held_out, process_group=self.process_group, filler_batch=self._filler_batch
        )

    def repair_for(self, drop: PlannedDrop) -> tuple[Repair | None, dict[str, Any]]:
        """The repair for a planned drop, if it lowers the held-out loss; the same on every process, or an error on all.

        Returns:
            The repair, and its result in plain values: a `RepairReport` and `weights` (for each refitted weight, by its name
            in the block, the layers of the base in which it was refitted); or `why` there is none.

        Raises:
            ValueError: If a repair is required and there is none. Nothing has changed.
        """
        model = drop.model
        if adapters_of(base_of(model)):
            if self.config.repair == "required":
                refuse_adapters(model)
            return self._none("the model has adapters, whose checkpoints do not hold their base")
        with all_or_none(self.process_group):
            self._to_fit = self._to_fit or self._enough(model)
            if not sum(self.process_group.gather(len(self._to_fit))) and self.config.repair != "required":
                return self._none("no training examples are left beside the calibration set")
            (repair,) = self.fit(model, [drop.dropped(self.config.unit)])
            if self.config.repair == "required":
                refuse_without_refits(repair)
            if not repair.refits:
                return self._none("; ".join(f"{gap}: {why}" for gap, why in repair.unrepaired.items()))
            report = self.evaluate(model, repair)
        (logger.info if report.applied else logger.warning)(str(report))
        weights: dict[str, list[int]] = {}
        kept = LayerMap.from_config(model.config, self.config.part).kept_layers
        for refit in repair.refits if report.applied else ():
            weights.setdefault(refit.projection.name, []).append(kept[refit.position])
        return repair if report.applied else None, {**asdict(report), "weights": weights}

    def _none(self, why: str) -> tuple[None, dict[str, Any]]:
        logger.warning(f"No repair, the plain drop stays ({why}).")
        return None, {"applied": False, "why": why}

    def _enough(self, model: nn.Module) -> list[Batch]:
        """This process's share of as many training examples as are needed for enough tokens."""
        part = self.config.part
        wanted = self.config.repair_tokens or TOKENS * _width(model, part)
        found: list[Batch] = []
        tokens, each = 0, self._batch_size * self.process_group.world_size
        with isolated_rng(self.config.calibration_seed):
            while tokens < wanted and (examples := list(islice(self._rest, each))):
                batches = self._batches(examples).inputs
                tokens += sum(self.process_group.gather(sum(_num_tokens(model, batch, part) for batch in batches)))
                found += batches
        return found

    def _batches(self, examples: Sequence[Any]) -> TrainerBatches:
        """This process's share, as the Trainer passes it to its model."""
        group, model = self.process_group, unwrapped(self._trainer)
        return TrainerBatches(self._trainer, model, examples, self._dataloader, group.rank, group.world_size)


def _examples(config: TrimConfig, training: Any, calibration: Any) -> tuple[list[Any], Iterable[Any]]:
    """The calibration examples, and an iterator over the other training examples."""
    size, seed = config.calibration_size, config.calibration_seed
    if hasattr(training, "__len__"):
        size = min(size, max(1, len(training) // 2))  # some must be left to fit on
        order = iter(draw(len(training), len(training), seed))
        drawn = [] if calibration is not None else [training[i] for i in islice(order, size)]
        rest: Iterable[Any] = (training[i] for i in order)
    else:
        rest = iter(training)
        drawn = [] if calibration is not None else list(islice(rest, size))
    return (drawn if calibration is None else list(calibration)), rest


def _num_tokens(model: nn.Module, batch: Batch, part: str | None) -> int:
    tokens, mask = real_tokens(model, batch, part)
    return int(tokens.shape[:2].numel() if mask is None else (mask != 0).sum())


def _width(model: nn.Module, part: str | None) -> int:
    """The largest number of inputs of a linear map in a block: the width of the MLP."""
    block = find_blocks(base_of(model), part).blocks[0]
    return max((shape_of(module)[0] for module in block.modules() if is_linear(module)), default=1)
