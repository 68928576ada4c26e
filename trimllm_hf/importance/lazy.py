"""Choosing several layers with few passes: block influence says who is looked at, and old scores who is looked at again."""

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
from ..surgery.units import block_input
from .calibration import Batch
from .evaluation import evaluate_metric
from .forwards import replaced_forwards
from .metrics import Metric, get_metric
from .scores import score_layers

Cost = Callable[[Collection[int]], float]  # of the model without the layers at these positions


@dataclass(frozen=True)
class Greedy:
    """Layers that were left out one after the other.

    Attributes:
        layers: Their positions, in the order in which they were chosen.
        cost: What was measured of the model without all of them; lower is better.
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
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> Greedy:
    """Choose several blocks of a model by leaving them out one after the other, with few passes: see `lazy_greedy`.

    Args:
        model: A transformers model, unwrapped; nothing of it changes.
        batches: Dicts of model inputs, with labels.
        count: How many blocks go.
        candidates: Positions of those that may go. Default: all but the first and the last.
        width: How many of the candidates are looked at for each, those of the lowest block influence. None: all, beginning
            with a scan of the whole model.
        metric: What is measured of the model without blocks; see `score_layers`.
        part: Of an encoder-decoder, whose blocks.
        process_group: The processes of the run, for example an engine; None in one process.
        filler_batch: A batch for the forward passes of a process whose share is empty; it does not count.

    Raises:
        ValueError: If fewer blocks may go than have to, or there is nothing to measure on.
    """
    found, passed = get_metric(metric), PassedOver(model, part)
    processes: dict[str, Any] = {"process_group": process_group, "filler_batch": filler_batch}

    def cost(positions: Collection[int]) -> float:
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
    """Leave out one layer after the other, each time that without which the cost is lowest, and measure few models for it.

    Looked at are the first `width` of `order` that are still there (a filter: an order by block influence). One of them that
    was measured before is measured again only while what it added to the cost then says that it may be the cheapest now
    (Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions"). That is exact where a layer adds
    the more, the more others are gone; where it is not so, another layer that adds about as much may be taken.

    Args:
        cost: Measures the model without some layers; lower is better.
        order: Positions of the layers that may go, the likeliest first.
        count: How many go.
        width: How many are looked at; all of them: a greedy scan.
        of_each: The cost without each layer alone, where a scan has measured it.

    Raises:
        ValueError: If fewer than `count` layers may go, or the width is below 1.
    """
    if not 0 < count <= len(order) or width < 1:
        raise ValueError(
            f"Expected a count of 1 to {len(order)}, the layers that may go, and a width of at least 1, got count={count} "
            f"and width={width}."
        )
    now, evaluations, gone = cost(()), 1, list[int]()
    added = {layer: value - now for layer, value in (of_each or {}).items()}
    fresh = set(added)  # measured with the layers gone that are gone now
    while len(gone) < count:
        left = [layer for layer in order if layer not in gone][:width]
        while (cheapest := min(left, key=lambda layer: added.get(layer, -math.inf))) not in fresh:
            added[cheapest] = cost((*gone, cheapest)) - now
            fresh.add(cheapest)
            evaluations += 1
        gone.append(cheapest)
        now += added[cheapest]
        fresh.clear()
    return Greedy(tuple(gone), now, evaluations)


class PassedOver:
    """Runs a model as if some blocks were not there: their inputs are handed on, and they do no work.

    Args:
        model: The model, unwrapped. It stays as it is.
        part: Of an encoder-decoder, the stack that the blocks are of.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        self._blocks = list(find_blocks(base_of(model), part).blocks)
        self._rests: dict[int, tuple[Any, ...] | None] = {}  # what each block returns behind its hidden states
        self._must_run: set[int] = set()  # blocks that return further tensors (T5's position bias)

    @contextmanager
    def without(self, positions: Collection[int]) -> Iterator[None]:
        """Pass over the blocks at these positions."""
        positions = sorted(positions)

        def passing(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            position = positions[number]

            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = block_input(args, kwargs)
                if position not in self._rests or position in self._must_run:
                    output = forward(*args, **kwargs)
                    rest = output[1:] if isinstance(output, tuple) else None
                    if any(isinstance(item, torch.Tensor) for item in rest or ()):
                        self._must_run.add(position)
                    self._rests[position] = rest
                rest = self._rests[position]
                return hidden if rest is None else (hidden, *rest)

            return run

        with replaced_forwards([self._blocks[position] for position in positions], passing):
            yield
