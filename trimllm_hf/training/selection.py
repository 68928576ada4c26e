"""Selects the next layer to drop: a run's calibration examples, and the scores it uses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..engines import ProcessGroup
from ..importance import (
    goes_by_loss,
    is_joint,
    needs_data,
    per_ms,
    standard_error,
)
from ..importance.gradient import refuse_frozen, refuse_no_gradient, weights_times_gradients
from ..importance.order import Chosen, choose, choose_window
from ..layer_map import LayerMap
from ..surgery.drop import PlannedDrop, plan_drop
from ..surgery.feasibility import Planner, least_important
from ..surgery.trimmable import resolve_model
from .budgeted_selection import choose_within_budget
from .config import TrimConfig
from .drop_log import scoring
from .dry_run import droppable
from .layer_scorer import LayerScorer
from .layer_times import layer_names, names_of
from .repairer import Repairer
from .selection_budget import plan_selection
from .trainer_hooks import unwrapped

logger = logging.get_logger("transformers.trimllm_hf")


class LayerSelector:
    """Chooses the least important layers of the model in its current state.

    Args:
        config: The settings.
        trainer: The Trainer.
        engine: For agreement between the processes.
        dataloader: The training data loader, which defines how examples become batches.
        dataset: The calibration examples; None: drawn from the training set.
        spared: Layers that are dropped last, in the base's numbering.
        sizes: For each depth, how many layers must be dropped at once, from `dry_run`.
        unit_ms: The times from `ms_of_layers`; scores are then per ms.
        run_examples: Number of training examples per selection of layers; a selection budget is a share of it.
        repairer: Repairs the model when sets of layers are compared.

    Raises:
        ValueError: If there are no examples or no metric of that name, if layers are frozen and the score uses gradients, or
            if the selection budget is too small.
    """

    def __init__(
        self,
        config: TrimConfig,
        trainer: Trainer,
        engine: ProcessGroup,
        dataloader: Any,
        dataset: Any = None,
        spared: Collection[int] = (),
        sizes: Mapping[int, int] = MappingProxyType({}),
        unit_ms: Mapping[str, float] = MappingProxyType({}),
        run_examples: float = math.inf,
        repairer: Repairer | None = None,
    ) -> None:
        self.config, self.engine, self.spared, self.sizes, self.unit_ms = config, engine, spared, sizes, unit_ms
        self.run_examples, self.repairer = run_examples, repairer
        if config.by_budget:
            plan_selection(config.selection_budget, run_examples, 1, 1, 1)  # raises if nothing is affordable
        if config.importance == "taylor":
            refuse_no_gradient(engine)
            refuse_frozen(unwrapped(trainer), config.unit, config.part)
        self.scorer = LayerScorer(config, trainer, engine, dataloader, dataset)
        self.scoring: dict[str, Any] = {}  # the last one, in plain values
        self.margin: float | None = None  # for the last drop, how much higher the score of the next candidate was
        self._gradients: tuple[int, dict[Any, float]] | None = None  # step, and each layer's score from its gradients

    def try_score(self, model: PreTrainedModel, importance: str) -> None:
        """Score the layers with one batch per process."""
        with self._or_none(), self.scorer.first_batch():
            self.scorer.score(model, importance, progress=False)

    def most_important(self, model: PreTrainedModel, count: int, progress: bool = False) -> list[int]:
        """Positions of the `count` layers with the highest scores, ascending; the same on every process, or an error on all.

        On ties the shallower layer is preferred: the deeper one is dropped first.
        """
        with self._or_none():
            scores = self.scorer.score(model, self.config.score, progress)
        order = sorted(range(len(scores)), key=lambda position: (-scores[position].item(), position))
        return sorted(order[:count])

    def next_drop(self, model: PreTrainedModel, step: int, progress: bool = False, count: int = 1) -> PlannedDrop:
        """Score the layers, and plan to drop the least important; the same on every process, or an error on all.

        If verification refuses that drop, the least important layers that it allows are chosen.

        Args:
            model: The unwrapped model.
            step: Optimizer step, for the map's history.
            progress: Whether to show a bar.
            count: How many layers to drop by these scores, from `at_once`.

        Raises:
            ValueError: If the layers cannot be scored, or verification refuses. Nothing has changed.
        """
        config = self.config
        with self._or_none():
            importance = self._importance(model, step)
            chosen, scores, spread = self._choose(model, step, progress, count, importance)
            self.scorer.of_batches = []  # do not keep them while the model trains
            margin = chosen.margin
            target = resolve_model(model, config.part)
            self.scoring = scoring(importance, layer_names(model, config), scores, spread)

            def plan(positions: list[int]) -> PlannedDrop:
                of_each = chosen.scores if positions == chosen.positions else scores[positions].tolist()
                named = f"{importance} per ms" if self.unit_ms else importance
                return plan_drop(target, positions, config.unit, step, named, of_each, portable=config.portable)

            try:
                drop = plan(chosen.positions)
            except ValueError:
                if is_joint(importance):
                    raise
                margin = None
                drop = self._allowed(model, plan, {p: scores[p].item() for p in droppable(model, config)}, count)
        self.margin = margin
        return drop

    @contextmanager
    def _or_none(self) -> Iterator[None]:
        """Let either all processes continue or none: no process may drop, or wait, on its own."""
        try:
            yield
        except Exception as error:
            self.engine.raise_on_all(error)
            raise
        self.engine.all_reduce(torch.zeros(1))

    def at_once(self, due: int, depth: int) -> int:
        """How many layers to drop per scoring: one, unless more are chosen together, or must be dropped together."""
        process_group = 1 if self.config.rescore and not (self.config.by_budget or is_joint(self.config.score)) else due
        return max(process_group, self.sizes.get(depth, 1))

    def _allowed(self, model: PreTrainedModel, plan: Planner, scores: Mapping[int, float], count: int) -> PlannedDrop:
        """The least important layers that verification allows individually; if there are too few, a run of adjacent ones."""
        positions: list[int] = []
        spared = set(self._spared(model))
        refusal: ValueError | None = None
        for position in sorted(scores, key=lambda position: (position in spared, scores[position], -position)):
            try:
                drop = plan(sorted([*positions, position]))
            except ValueError as error:
                refusal = refusal or error
                continue
            positions.append(position)
            if len(positions) == count:
                return drop
        if count == 1 and refusal is not None:
            raise refusal
        return least_important(plan, scores, count, count)

    def take_gradients(self, model: PreTrainedModel, step: int) -> None:
        """Score by the parameters' current gradients, for a drop after the optimizer step `step`."""
        shares = weights_times_gradients(model, self.config.unit, self.engine.world_size, self.config.part)
        self._gradients = step, dict(zip(names_of(model, self.config), shares.tolist(), strict=True))

    def _importance(self, model: PreTrainedModel, step: int) -> str:
        """The score to use now: not one based on the loss while the loss is at chance level."""
        config, instead = self.config, self.config.warm_up_importance
        if instead == "none" or not goes_by_loss(config.score):
            return config.score
        found = self.scorer.loss_at_chance(model)
        if found is None:
            return config.score
        logger.warning(
            f"Step {step}: the loss on the calibration set, {found[0]:.4g}, is at chance: knowing only how frequent each "
            f"label is gives {found[1]:.4g}. Choosing by {instead} instead of {config.score}."
        )
        return instead

    def _choose(
        self, model: PreTrainedModel, step: int, progress: bool, count: int, importance: str
    ) -> tuple[Chosen, torch.Tensor, torch.Tensor | None]:
        """The layers to drop, all scores, and their standard errors if available."""
        config, self.scorer.of_batches = self.config, []
        if config.by_budget:
            of_run = step, self._spared(model), self.run_examples, self.repairer
            found = choose_within_budget(model, self.scorer, count, config, *of_run)
            return *found, standard_error(self.scorer.of_batches)
        ends = config.protect_first, config.protect_last
        scores = self._scores_by_training(model, step) if importance == config.importance else None
        times = [self.unit_ms[name] for name in layer_names(model, config)] if self.unit_ms else None
        if scores is None:
            scores = self.scorer.score(model, importance, progress, count, times)
        elif times is not None:
            scores = per_ms(scores, 0.0, times)
        spread = standard_error(self.scorer.of_batches)
        if is_joint(importance):
            return choose_window(scores, count, *ends), scores, None
        breaker = config.tie_breaker
        tie_scores = None if breaker is None else lambda: self.scorer.score(model, breaker, progress)
        candidates, spared = droppable(model, config), self._spared(model)
        return choose(scores, count, tie_scores=tie_scores, candidates=candidates, spared=spared), scores, spread

    def _spared(self, model: PreTrainedModel) -> list[int]:
        if not self.spared:
            return []
        kept = LayerMap.from_config(model.config, self.config.part).kept_layers
        return [position for position, layer in enumerate(kept) if layer in self.spared]

    def _scores_by_training(self, model: PreTrainedModel, step: int) -> torch.Tensor | None:
        """The scores from the gradients of the last step, if they are available and finite."""
        if self._gradients is None or self._gradients[0] != step:
            return None
        shares = self._gradients[1]
        names = names_of(model, self.config)
        scores = self.engine.all_reduce(torch.tensor([shares[name] for name in names], dtype=torch.float64))
        # in half precision a step may overflow and be skipped
        return scores if torch.isfinite(scores).all() and scores.any() else None


def takes_calibration_examples(config: TrimConfig) -> bool:
    """Whether a run uses calibration examples: to score layers, or to evaluate repairs."""
    return needs_data(config.score) or config.repair != "none"
