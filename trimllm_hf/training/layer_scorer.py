"""Scores a run's layers: the calibration examples, and what is measured on them with the Trainer's own loss or metric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..engines import ProcessGroup, all_or_none
from ..importance import METRICS, Metric, from_compute_metrics, get_metric, goes_by_loss, needs_data, score_layers
from ..importance.calibration import Batch, draw
from ..importance.metrics import LOSS
from ..importance.unigram_baseline import loss_at_unigram_baseline
from ..utils import isolated_rng
from .config import TrimConfig
from .layer_times import names_of
from .trainer_batches import TrainerBatches, computes_own_loss, main_input, predictions, trainer_loss, without_trace
from .trainer_hooks import unwrapped

logger = logging.get_logger("transformers.trimllm_hf")


class LayerScorer:
    """Scores the layers of the model in its current state.

    Args:
        config: The settings.
        trainer: The Trainer, whose loss is used by scores that need one.
        process_group: The processes of the run.
        dataloader: The training data loader, which defines how examples become batches.
        dataset: The calibration examples; None: drawn from the training set.

    Raises:
        ValueError: If there are no examples, the Trainer computes no loss for them, or the metric in the settings does not
            exist.
    """

    def __init__(
        self, config: TrimConfig, trainer: Trainer, process_group: ProcessGroup, dataloader: Any, dataset: Any = None
    ) -> None:
        self.config, self.trainer, self.process_group = config, trainer, process_group
        self.metric = metric_of(config, trainer)
        self.data: TrainerBatches | None = None
        self.of_batches: list[torch.Tensor] = []  # the last scores, per batch
        self.own_loss = True  # whether the Trainer's loss is the one that its model computes
        if not needs_data(config.score):
            return
        by_loss = goes_by_loss(config.score) or goes_by_loss(config.tie_breaker or "")
        if dataset is None:
            held = trainer.train_dataset if trainer.train_dataset is not None else getattr(dataloader, "dataset", None)
            dataset = _drawn(config, held)
        model, ranks = unwrapped(trainer), (process_group.rank, process_group.world_size)
        with isolated_rng(config.calibration_seed), all_or_none(process_group):  # a collator may use random numbers
            self.data = TrainerBatches(trainer, model, list(dataset), dataloader, *ranks)
            if by_loss:
                self._refuse_no_loss(self.data)
            if by_loss or config.by_budget:
                # for a selection with a budget, one batch must suffice
                seen = self.data if by_loss else self.data.first()
                with without_trace(trainer):
                    self.own_loss = computes_own_loss(trainer, model, seen, process_group)

    def score(
        self, model: PreTrainedModel, importance: str, progress: bool, window: int = 1, unit_ms: list[float] | None = None
    ) -> torch.Tensor:
        """The score of each layer, the same on every process; see `score_layers` for the arguments."""
        batches: list[Batch] = []
        filler_batch = loss = None
        if self.data is not None:
            batches, filler_batch = self.data.inputs, self.data.filler_inputs
            if goes_by_loss(importance) and self._asks_trainer():
                batches, filler_batch = self.data.collated, self.data.filler
                loss = trainer_loss(self.trainer)
        self.of_batches = []
        with without_trace(self.trainer):
            return score_layers(
                model,
                batches,
                importance,
                self.config.unit,
                metric=self.metric,
                window=window,
                seed=self.config.calibration_seed + len(names_of(model, self.config)),
                memory_gb=self.config.scan_memory_gb,
                unit_ms=unit_ms,
                progress=progress,
                part=self.config.part,
                process_group=self.process_group,
                filler_batch=filler_batch,
                loss=loss,
                of_batches=self.of_batches,
            )

    def needed_data(self) -> TrainerBatches:
        """The calibration batches, for scores that require them."""
        if self.data is None:
            raise ValueError(f"Expected an importance that looks at examples, got {self.config.score!r}.")
        return self.data

    @contextmanager
    def first_batch(self) -> Iterator[None]:
        """Score with one batch only."""
        whole = self.data
        self.data = whole and whole.first()
        try:
            yield
        finally:
            self.data = whole

    def loss_at_chance(self, model: PreTrainedModel) -> tuple[float, float] | None:
        """The loss and the baseline, if the loss is at chance level; see `loss_at_unigram_baseline`.

        None if the loss is not the model's own: the chance level of another loss is unknown.
        """
        if self.data is None or not self.own_loss:
            return None
        return loss_at_unigram_baseline(
            model,
            self.data.inputs,
            process_group=self.process_group,
            filler_batch=self.data.filler_inputs,
        )

    def _asks_trainer(self) -> bool:
        """Whether the Trainer computes what is measured: its own loss, or the inputs of its `compute_metrics`."""
        return not self.own_loss if self.metric is LOSS else self.metric.name not in METRICS

    def _refuse_no_loss(self, data: TrainerBatches) -> None:
        if not data.have_loss and self.metric.name != "choice_accuracy":
            raise ValueError(
                "Expected a Trainer whose loss is a function of its examples, to score layers by "
                f"{self.config.score!r}, got {type(self.trainer).__name__}, which generates what it trains on. Set "
                "importance='block_influence' (or another score without a loss): layers are then scored on the prompts."
            )


def metric_of(config: TrimConfig, trainer: Trainer) -> Metric:
    """What a run's scan measures: a metric by name, or a key in the result of the Trainer's `compute_metrics`.

    Raises:
        ValueError: If the name is unknown and the Trainer has no `compute_metrics`.
    """
    name, compute_metrics = config.scan_metric, trainer.compute_metrics
    if name in METRICS or compute_metrics is None:
        return get_metric(name)
    wanted = trainer.args.include_for_metrics
    return from_compute_metrics(
        name,
        compute_metrics,
        trainer.preprocess_logits_for_metrics,
        config.scan_greater_is_better,
        predict=predictions(trainer),
        inputs_of=main_input(trainer) if "inputs" in wanted else None,
        with_losses="loss" in wanted,
        batch_by_batch=trainer.args.batch_eval_metrics,
    )


def _drawn(config: TrimConfig, dataset: Any) -> list[Any]:
    if dataset is None:
        raise ValueError(
            "Expected a training set to draw calibration examples from, got a data loader without one. Pass "
            "calibration_dataset to TrimCallback."
        )
    logger.warning(
        f"TrimCallback scores layers on {config.calibration_size} examples of the training set, which are trained on as "
        "well. Use TrimTrainer, which sets them aside, or pass calibration_dataset."
    )
    if hasattr(dataset, "__len__"):
        size = min(config.calibration_size, len(dataset))
        return [dataset[i] for i in draw(len(dataset), size, config.calibration_seed)]
    return list(islice(iter(dataset), config.calibration_size))
