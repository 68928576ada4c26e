"""Importance: one score per layer, higher = keep. A registry of plain functions by name.

A score is a mean over tokens (or examples). A function in `statistics.py` or `rules.py`, or a user-defined one, returns its
*totals* over the batches it was given and the number of tokens, so that processes with shares of different sizes agree on
the overall mean. A function in `scan.py` defines what is measured on the model without a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..engines import ProcessGroup, SingleProcess
from ..layer_map import LayerMap, resolve_part
from ..surgery.adapters import base_of
from ..surgery.units import list_units
from ..utils import isolated_rng
from .calibration import Batch
from .evaluation import evaluate_metric, on_every_process, to_be_scored
from .finite import refuse_not_finite
from .gradient import taylor
from .metrics import LOSS, Loss, Metric, from_loss, get_metric, own_loss
from .per_ms import per_ms, refuse_without_zero
from .rules import deepest_except_last, first, last, random
from .scan import ScanSettings, perplexity, scan, sensitivity
from .statistics import activation_norm, angular, block_influence, layer_redundancy, relative_magnitude

Importance = Callable[..., tuple[torch.Tensor, float]]  # takes a model, batches and a unit; optionally a part

_SCANS: dict[str, Callable[[Metric], Metric]] = {"sensitivity": sensitivity, "perplexity": perplexity}
_GRADIENTS = {"taylor": taylor}
_FROM_ZERO = {*_SCANS, *_GRADIENTS, "block_influence", "relative_magnitude"}  # 0, or the full model's value: free to drop
_RULES: dict[str, Importance] = {
    "last": last,
    "deepest_except_last": deepest_except_last,
    "first": first,
    "random": random,
}
_REGISTRY: dict[str, Importance] = {
    "activation_norm": activation_norm,
    "angular": angular,
    "block_influence": block_influence,
    "layer_redundancy": layer_redundancy,
    "relative_magnitude": relative_magnitude,
    **_RULES,
}


def register_importance(name: str, function: Importance) -> None:
    """Make a custom score usable as `TrimConfig(importance=name)`.

    Args:
        name: The name; it must not be taken.
        function: Takes the model (in evaluation mode, no gradients), the batches (dicts of tensors on the model's
            device) and the unit; returns the totals, a tensor of shape (layers,), and the count by which to divide the
            sum of the totals of all processes. Higher = more important. If it has a parameter `part`, it is passed the
            stack of an encoder-decoder; otherwise only the default stack can be scored.

    Raises:
        ValueError: If the name is taken.
    """
    if name in known():
        raise ValueError(f"Expected a new name for an importance, got {name!r}, which exists. Choose another.")
    _REGISTRY[name] = function


def known() -> list[str]:
    """The names of all scores."""
    return sorted([*_REGISTRY, *_SCANS, *_GRADIENTS])


def needs_data(name: str) -> bool:
    """Whether the score uses calibration examples.

    Raises:
        ValueError: If there is no score of that name; lists the existing ones.
    """
    if name not in known():
        raise ValueError(f"Expected an importance among {known()}, got {name!r}. Add it: register_importance.")
    return name not in _RULES


def goes_by_loss(name: str) -> bool:
    """Whether the score measures a layer's effect on the loss (or another measure of the labels)."""
    return name in _SCANS or name in _GRADIENTS


def refuse_not_per_ms(*names: str) -> None:
    """Refuse scores that are not available per millisecond.

    Raises:
        ValueError: Naming those that are.
    """
    for name in names:
        refuse_without_zero(name, _FROM_ZERO)


def is_joint(name: str) -> bool:
    """Whether the score is for windows of successive layers that are dropped together, not for each layer."""
    return name == "angular"


def score_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    importance: str = "sensitivity",
    unit: str = "block",
    *,
    metric: str | Metric = "loss",
    window: int = 1,
    seed: int = 0,
    memory_gb: float | None = None,
    unit_ms: Sequence[float] | None = None,
    progress: bool = False,
    part: str | None = None,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
    loss: Loss | None = None,
    of_batches: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Score every layer of a model on calibration batches.

    Args:
        model: A transformers model, unwrapped.
        batches: Dicts of model inputs, moved to the model's device here; with labels, if the score needs a loss.
        importance: Name of the score.
        unit: "block"; or "sublayer": a score for each attention and each MLP, in the order of `LayerMap.sublayers`
            (attention, then MLP of each block; 2n for a base of n blocks).
        metric: For a scan: what is measured on the model without a layer. "loss", "choice_accuracy" (rows as
            `QuestionEncoder.rows` makes them), or one made by `from_compute_metrics`.
        window: For `angular`: how many successive layers are dropped together.
        seed: For scores that draw random numbers. Global random state is left as it was.
        memory_gb: For a scan: memory for its candidates, in 10^9 bytes, in addition to a forward pass. None: half of
            the free memory.
        unit_ms: The time that each layer takes, in ms. Scores are then what the model loses without a layer, per ms saved:
            for a scan, by how much the metric is worse than that of the unchanged model (one more pass over the batches);
            for `block_influence`, `relative_magnitude` and `taylor`, the score itself. If the model is better without a
            layer, the score is minus the gain times the ms. Other scores are refused.
        progress: For a scan: whether to show a bar with the candidates scored.
        part: For an encoder-decoder, the stack to score: "decoder" or "encoder"; see `drop_layers`.
        process_group: The processes of the run, for example an engine; None in one process.
        filler_batch: A batch for the forward passes of a process whose share is empty; it does not count.
        loss: Computes the loss, for scores that use it: takes the model and a batch, and returns the mean loss as a tensor
            and the number of labels or examples that it is the mean of. By default the loss that the model computes itself.
            If given, a batch may be anything that this function accepts.
        of_batches: A list to which the scores on each batch of all processes are appended, if they are defined for a single
            batch: for a scan by the loss, and for statistics. For `standard_error`.

    Returns:
        Scores of shape (layers,), or (sublayers,) for sublayers, float64 on the CPU, the same on every process. Higher =
        more important. For `angular`, of shape (layers - window + 1,): one for each window, by its first layer.

    Raises:
        ValueError: If the name is unknown, there are no batches to score on, a batch is empty, or a score is not finite.
    """
    with_data = needs_data(importance)
    batches, metric = list(batches), get_metric(metric)
    if loss is not None and metric is LOSS:
        metric = from_loss(loss)
    if unit_ms is not None:
        refuse_not_per_ms(importance)
        processes: dict[str, Any] = {"process_group": process_group, "filler_batch": filler_batch}
        how: dict[str, Any] = {"metric": metric, "loss": loss, "seed": seed, "memory_gb": memory_gb, "progress": progress}
        scores = score_layers(model, batches, importance, unit, part=part, **how, **processes)
        return per_ms(scores, _of_none(importance, model, batches, metric, processes), unit_ms)
    process_group = process_group or SingleProcess()
    padded = on_every_process(model, batches, importance, process_group, filler_batch) if with_data else []
    with isolated_rng(seed), to_be_scored(model), process_group.heard(model):
        if importance in _SCANS:
            settings = ScanSettings(_SCANS[importance](metric), memory_gb, process_group, progress, of_batches)
            return scan(model, padded, len(batches), unit, settings, part)
        if importance in _GRADIENTS:
            return _GRADIENTS[importance](model, padded, len(batches), unit, process_group, loss or own_loss, part)
        function = partial(angular, window=window) if is_joint(importance) else _REGISTRY[importance]
        function = _of_part(importance, function, model, part)
        scores = _mean(importance, function, model, padded, len(batches), unit, process_group, of_batches)
    if unit != "block" and len(scores) != len(list_units(model, unit, part)):
        raise ValueError(f"Expected unit='block' for the importance {importance!r}, got {unit!r}. Use a scan or a rule.")
    return scores


def _of_part(name: str, function: Importance, model: nn.Module, part: str | None) -> Importance:
    """The function for a stack. A function without a parameter `part` scores the stack that the model's config describes.

    Raises:
        ValueError: If that is a different stack, or the model has no such stack.
    """
    config = base_of(model).config
    if "part" in inspect.signature(function).parameters:
        return partial(function, part=part)
    if LayerMap.from_config(config, part).part != resolve_part(config):
        raise ValueError(
            f"Expected an importance with a parameter 'part', to score the {part}, got {name!r}, which has none. Register a "
            "function of (model, batches, unit, part)."
        )
    return function


def _of_none(importance: str, model: nn.Module, batches: Sequence[Batch], metric: Metric, processes: Any) -> float:
    """The score of a layer whose absence changes nothing."""
    if importance not in _SCANS:
        return 0.0
    of_scan = _SCANS[importance](metric)
    return of_scan.importance(evaluate_metric(model, batches, of_scan, **processes))


def _mean(
    name: str,
    function: Importance,
    model: nn.Module,
    batches: Sequence[Batch],
    num_counted: int,
    unit: str,
    process_group: ProcessGroup,
    of_batches: list[torch.Tensor] | None,
) -> torch.Tensor:
    """The mean of a function's totals over the batches of all processes; batches after `num_counted` do not count."""
    sums: torch.Tensor | None = None
    wrong: list[tuple[list[int], int]] = []
    alone: list[torch.Tensor] = []
    for number, batch in enumerate([[batch] for batch in batches] or [[]]):
        totals, count = function(model, batch, unit)
        both = torch.cat([totals.double().cpu(), torch.tensor([count], dtype=torch.float64)])
        if batch and number >= num_counted:
            both = torch.zeros_like(both)  # a pass only to stay in step with the other processes
        elif both[-1] > 0:
            alone.append(both[:-1] / both[-1])
        sums = both if sums is None else sums + both
        if bad := (~torch.isfinite(both[:-1])).nonzero().flatten().tolist():
            wrong.append((bad, number))
    assert sums is not None  # there is at least one pass
    sums = process_group.all_reduce(sums)
    if sums[-1] <= 0:
        raise ValueError(
            f"Expected calibration batches with tokens to score by {name!r}, got {num_counted} batches without any."
        )
    scores = sums[:-1] / sums[-1]
    refuse_not_finite(name, scores, process_group.gather(wrong))
    if of_batches is not None:
        of_batches += [batch for process in process_group.gather(alone) for batch in process]
    return scores
