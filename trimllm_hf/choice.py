"""Which layers go next: a run's calibration examples, the scores by which it chooses, and a rehearsal of its plan.

Most architectures allow any layer to go. Some tie a property to a layer's place (the only attention of a hybrid, the first
block of T5), and some repeat a pattern that their config cannot write out: there only a whole period can go, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from types import MappingProxyType
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
from .importance import METRICS, Metric, from_compute_metrics, get_metric, is_joint, needs_data, score_layers
from .importance.gradient import refuse_no_gradient, weights_times_gradients
from .importance.order import Chosen, choose, choose_window
from .layer_map import LayerMap
from .stack import find_stack
from .surgery import PlannedDrop, plan_drop

logger = logging.get_logger("transformers.trimllm_hf")

Planner = Callable[[list[int]], PlannedDrop]  # plans a drop of some positions, or raises a ValueError


class LayerChoice:
    """Chooses the least important layers of the model as it is at that time.

    Args:
        config: The settings.
        trainer: The Trainer.
        engine: How the processes agree.
        dataloader: The training run's: it tells how examples become batches.
        dataset: The calibration examples; None: drawn from the training set.
        sizes: For each depth, how many layers have to go at once: what `rehearse` found.

    Raises:
        ValueError: If there are no examples, or there is no metric as the settings name it.
    """

    def __init__(
        self,
        config: TrimConfig,
        trainer: Trainer,
        engine: Engine,
        dataloader: Any,
        dataset: Any = None,
        sizes: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.config, self.engine, self.sizes = config, engine, sizes
        if config.importance == "taylor":
            refuse_no_gradient(engine)
        self.metric = metric_of(config, trainer)
        self.margin: float | None = None  # of the last drop: how much higher the score of the next candidate was
        self._gradients: tuple[int, dict[int, float]] | None = None  # step, and each block's score by its gradients
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

    def next_drop(self, model: PreTrainedModel, step: int, progress: bool = False, count: int = 1) -> PlannedDrop:
        """Score the layers, and plan to drop the least important; the same on every process, or an error on all.

        Where the guard refuses that, the least important of those that it lets go.

        Args:
            model: The unwrapped model.
            step: Optimizer step, for the map's history.
            progress: Whether to show a bar.
            count: How many layers go by these scores; `at_once` says it.

        Raises:
            ValueError: If the layers cannot be scored, or the guard refuses. Nothing has changed.
        """
        config = self.config
        try:
            chosen, scores = self._choose(model, step, progress, count)
            self.margin = chosen.margin

            def plan(positions: list[int]) -> PlannedDrop:
                of_each = chosen.scores if positions == chosen.positions else scores[positions].tolist()
                how: dict[str, Any] = {"step": step, "importance": config.importance, "part": config.part}
                return plan_drop(model, positions, config.unit, scores=of_each, **how)

            try:
                drop = plan(chosen.positions)
            except ValueError:
                if is_joint(config.importance):
                    raise
                self.margin = None
                drop = self._allowed(plan, scores, count)
        except Exception as error:  # one process must not drop, or wait, alone
            self.engine.fail(error)
            raise
        self.engine.agree(torch.zeros(1))  # nobody failed: all of them drop
        return drop

    def at_once(self, due: int, depth: int) -> int:
        """How many layers to drop by one scoring: one, unless more are chosen together, or have to go together."""
        together = 1 if self.config.rescore and not is_joint(self.config.importance) else due
        return max(together, self.sizes.get(depth, 1))

    def _allowed(self, plan: Planner, scores: torch.Tensor, count: int) -> PlannedDrop:
        """The least important layers that the guard lets go; a run of them, where none may go alone."""
        values = {position: scores[position].item() for position in unprotected(self.config, len(scores))}
        if self.sizes.get(len(scores), 1) > 1:
            return least_important(plan, values, count, count)
        positions: list[int] = []
        refusal: ValueError | None = None
        for position in sorted(values, key=lambda position: (values[position], -position)):
            try:
                drop = plan(sorted([*positions, position]))
            except ValueError as error:
                refusal = refusal or error
                continue
            positions.append(position)
            if len(positions) == count:
                return drop
        assert refusal is not None
        raise refusal

    def take_gradients(self, model: PreTrainedModel, step: int) -> None:
        """Score by the gradients that the parameters hold now, for a drop after the optimizer step `step`."""
        blocks = find_stack(model, self.config.part).blocks
        shares = weights_times_gradients(model, self.config.unit)
        self._gradients = step, {id(block): share for block, share in zip(blocks, shares.tolist(), strict=True)}

    def _choose(self, model: PreTrainedModel, step: int, progress: bool, count: int) -> tuple[Chosen, torch.Tensor]:
        config = self.config
        ends = config.protect_first, config.protect_last
        scores = self._scores_by_training(model, step)
        if scores is None:
            scores = self._score(model, config.importance, progress, count)
        if is_joint(config.importance):
            return choose_window(scores, count, *ends), scores
        breaker = config.tie_breaker
        ties = None if breaker is None else lambda: self._score(model, breaker, progress)
        return choose(scores, count, *ends, ties), scores

    def _score(self, model: PreTrainedModel, importance: str, progress: bool, window: int = 1) -> torch.Tensor:
        return score_layers(
            model,
            self.batches,
            importance,
            self.config.unit,
            metric=self.metric,
            window=window,
            seed=self.config.calibration_seed + len(find_stack(model, self.config.part)),
            memory_gb=self.config.scan_memory_gb,
            progress=progress,
            part=self.config.part,
            together=self.engine,
            stand_in=self.stand_in,
        )

    def _scores_by_training(self, model: PreTrainedModel, step: int) -> torch.Tensor | None:
        """The scores by the gradients of the step that was just made, if there are any that are numbers."""
        if self._gradients is None or self._gradients[0] != step:
            return None
        shares = self._gradients[1]
        blocks = find_stack(model, self.config.part).blocks
        scores = self.engine.agree(torch.tensor([shares[id(block)] for block in blocks], dtype=torch.float64))
        # in half precision a step may overflow, and is skipped
        return scores if torch.isfinite(scores).all() and scores.any() else None


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


def drop_log(layer_map: LayerMap, step: int, margin: float | None, parameters: int) -> tuple[str, dict[str, float]]:
    """What to tell of the last drop, and to log: to a person, and to TensorBoard and its like."""
    record, depth = layer_map.history[-1], layer_map.num_layers
    score = max(record.scores or (float("nan"),))
    layers = f"layer{'s' * (len(record.dropped) > 1)} {', '.join(map(str, record.dropped))}"
    to_next = "no other candidate" if margin is None else f"margin to the next best {margin:.4g}"
    line = (
        f"Step {step}: dropped {layers} of {layer_map.base_num_layers} ({record.importance} {score:.4f}, {to_next}); "
        f"{depth} layers, {parameters:,} parameters left."
    )
    logs = {"trim/num_layers": depth, "trim/parameters": parameters, "trim/score": score}
    return line, logs if margin is None else {**logs, "trim/margin": margin}


def metric_of(config: TrimConfig, trainer: Trainer) -> str | Metric:
    """What a run's scan measures: a metric by its name, or a key of what the Trainer's `compute_metrics` returns.

    Raises:
        ValueError: If the Trainer has no `compute_metrics` for a name that is not known.
    """
    name, compute_metrics = config.scan_metric, trainer.compute_metrics
    if name in METRICS or compute_metrics is None:
        return get_metric(name)
    return from_compute_metrics(name, compute_metrics, trainer.preprocess_logits_for_metrics, config.scan_greater_is_better)


def _drawn(config: TrimConfig, dataset: Any) -> list[Any]:
    logger.warning(
        f"TrimCallback scores layers on {config.calibration_size} examples of the training set, which are trained on as "
        "well. Use TrimTrainer, which sets them aside, or pass calibration_dataset."
    )
    if hasattr(dataset, "__len__"):
        size = min(config.calibration_size, len(dataset))
        return [dataset[i] for i in draw(len(dataset), size, config.calibration_seed)]
    return list(islice(iter(dataset), config.calibration_size))
