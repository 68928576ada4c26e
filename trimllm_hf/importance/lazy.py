"""Chooses several layers with few passes: block influence selects candidates, and earlier scores which to measure again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..engines import ProcessGroup
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.units import behind_hidden, block_input
from .calibration import Batch
from .evaluation import evaluate_metric
from .forwards import replaced_forwards
from .metrics import Metric, get_metric
from .scores import score_layers

AGAIN = 2  # layers measured anew in each step at least: what a layer adds may also fall as others go (benchmarks/README.md)

Cost = Callable[[Collection[int]], float]  # the cost of the model without the layers at these positions


@dataclass(frozen=True)
class Greedy:
    """Layers left out one after another.

    Attributes:
        layers: Their positions, in the order in which they were chosen.
        cost: The measure of the model without all of them; lower is better.
        evaluations: How many models were measured.
    """

    layers: tuple[int, ...]
    cost: float
    evaluations: int


def greedy_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    count: int,
    *,
    candidates: Sequence[int] | None = None,
    width: int | None = None,
    metric: str | Metric = "loss",
    part: str | None = None,
    allowed: Callable[[Sequence[int]], bool] | None = None,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> Greedy:
    """Choose several blocks of a model by leaving them out one after another, with few passes; see `lazy_greedy`.

    Args:
        model: A transformers model, unwrapped; it is not changed.
        batches: Dicts of model inputs, with labels.
        count: How many blocks to choose.
        candidates: Positions of the blocks that may be chosen. Default: all but the first and the last.
        width: How many candidates are considered in each step, those of the lowest block influence. None: all, beginning
            with a scan of the whole model.
        metric: What is measured on the model without the blocks; see `score_layers`.
        part: For an encoder-decoder, the stack that the blocks belong to.
        allowed: Whether blocks can be removed together; the model is not run without others. None: any.
        process_group: The processes of the run, for example an engine; None in one process.
        filler_batch: A batch for the forward passes of a process whose share is empty; it does not count.

    Raises:
        ValueError: If there are fewer candidates than `count`, or there are no batches to measure on.
    """
    found, passed = get_metric(metric), PassedOver(model, part)
    processes: dict[str, Any] = {"process_group": process_group, "filler_batch": filler_batch}

    def cost(positions: Collection[int]) -> float:
        if positions and allowed is not None and not allowed(sorted(positions)):
            return math.inf
        with passed.without(positions):
            return found.importance(evaluate_metric(model, batches, found, **processes))

    if candidates is None:
        candidates = range(1, len(find_blocks(base_of(model), part)) - 1)
    first = "sensitivity" if width is None else "block_influence"
    scores = score_layers(model, batches, first, metric=metric if width is None else "loss", part=part, **processes)
    order = sorted(candidates, key=lambda position: (scores[position].item(), -position))
    of_each = {position: scores[position].item() for position in order} if width is None else None
    return lazy_greedy(cost, order, count, width=width or len(order), of_each=of_each)


def lazy_greedy(
    cost: Cost, order: Sequence[int], count: int, *, width: int, of_each: Mapping[int, float] | None = None
) -> Greedy:
    """Leave out layers one after another, each time the one whose removal gives the lowest cost, with few measurements.

    Each step considers the first `width` layers of `order` that remain (a filter, for example by block influence). A layer
    that was measured before is measured again only if, by the cost it added then, it may be the cheapest now (Minoux 1978,
    "Accelerated greedy algorithms for maximizing submodular set functions"), or the next after that. That is exact if the
    cost a layer adds grows with the number of layers removed; otherwise a layer that adds about as much may be chosen.

    Args:
        cost: Measures the model without some layers; lower is better.
        order: Positions of the layers that may be chosen, the most likely first.
        count: How many to choose.
        width: How many are considered in each step; with all of them it is a greedy scan.
        of_each: The cost without each layer alone, where a scan has measured it.

    Raises:
        ValueError: If fewer than `count` layers may be chosen, or the width is below 1.
    """
    if not 0 < count <= len(order) or width < 1:
        raise ValueError(
            f"Expected a count of 1 to {len(order)}, the layers that may go, and a width of at least 1, got count={count} "
            f"and width={width}."
        )
    now, evaluations, gone = cost(()), 1, list[int]()
    added = {layer: value - now for layer, value in (of_each or {}).items()}
    fresh = set(added)  # measured with the current set of removed layers
    while len(gone) < count:
        left = [layer for layer in order if layer not in gone][:width]
        while stale := [layer for layer in _cheapest(left, added) if layer not in fresh]:
            added[stale[0]] = cost((*gone, stale[0])) - now
            fresh.add(stale[0])
            evaluations += 1
        cheapest = _cheapest(left, added)[0]
        gone.append(cheapest)
        now += added[cheapest]
        fresh.clear()
    return Greedy(tuple(gone), now, evaluations)


def _cheapest(layers: Sequence[int], added: Mapping[int, float]) -> list[int]:
    """The layers that have to be measured before one is chosen; those without a cost are the first."""
    return sorted(layers, key=lambda layer: added.get(layer, -math.inf))[:AGAIN]


class PassedOver:
    """Runs a model as if some blocks were absent: their inputs are passed on without computation.

    Args:
        model: The model, unwrapped. It is not changed.
        part: For an encoder-decoder, the stack that the blocks belong to.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        self._blocks = list(find_blocks(base_of(model), part).blocks)
        self._rests: dict[int, tuple[Any, ...] | None] = {}  # what each block returns after its hidden states
        self._must_run: set[int] = set()  # blocks that return further tensors (T5's position bias)

    @contextmanager
    def without(self, positions: Collection[int]) -> Iterator[None]:
        """Skip the blocks at these positions."""
        positions = sorted(positions)

        def passing(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            position = positions[number]

            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = block_input(args, kwargs)
                if position not in self._rests or position in self._must_run:
                    output = forward(*args, **kwargs)
                    rest = behind_hidden(output)
                    if any(isinstance(item, torch.Tensor) for item in rest or ()):
                        self._must_run.add(position)
                    self._rests[position] = rest
                rest = self._rests[position]
                return hidden if rest is None else (hidden, *rest)

            return run

        with replaced_forwards([self._blocks[position] for position in positions], passing):
            yield
