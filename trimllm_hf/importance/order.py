"""Chooses the layers to drop from their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chosen:
    """The layers to drop next.

    Attributes:
        positions: Their positions, ascending.
        scores: Their scores, in that order. All layers of a window have the window's score.
        margin: By how much the lowest score among the remaining candidates is higher; None if none remain. About 0
            means that the choice was nearly arbitrary on these calibration examples.
    """

    positions: list[int]
    scores: list[float]
    margin: float | None


def choose(
    scores: torch.Tensor,
    count: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    tie_scores: Callable[[], torch.Tensor] | None = None,
    candidates: Sequence[int] | None = None,
    spared: Sequence[int] = (),
) -> Chosen:
    """The `count` candidates with the lowest scores. Ties are broken by the lowest tie score, then by the greatest depth.

    Args:
        scores: Of shape (layers,).
        count: How many layers to choose.
        protect_first: Number of layers at the input side to keep.
        protect_last: Number of layers at the output side to keep.
        candidates: The positions to choose from; by default those outside the protected ends.
        tie_scores: Returns the scores that break ties, of the same shape; called only if there is a tie to break.
        spared: Candidates that are chosen only when no others are left.
    """
    if candidates is None:
        candidates = range(protect_first, len(scores) - protect_last)
    surely: list[int] = []
    if spared:
        surely, candidates = [i for i in candidates if i not in spared], [i for i in candidates if i in spared]
        if len(surely) >= count:
            surely, candidates = [], surely
        count -= len(surely)
    values = {position: scores[position].item() for position in candidates}
    lowest = sorted(values.values())
    last_in = lowest[count - 1]
    ties: dict[int, float] = dict.fromkeys(candidates, 0.0)
    if tie_scores is not None and len(lowest) > count and _equal(last_in, lowest[count]):
        breakers = tie_scores()
        ties = {position: breakers[position].item() for position in candidates}
        # equal up to rounding: the tie breaker orders them
        values = {position: last_in if _equal(value, last_in) else value for position, value in values.items()}
    order = sorted(candidates, key=lambda position: (values[position], ties[position], -position))
    chosen = sorted(surely + order[:count])
    margin = values[order[count]] - values[order[count - 1]] if len(order) > count else None
    return Chosen(chosen, [scores[position].item() for position in chosen], margin)


def with_fewer_gaps(scores: torch.Tensor, positions: Sequence[int], candidates: Sequence[int]) -> list[list[int]]:
    """As many layers as `positions` in fewer gaps: the lowest total score with at most half as many, a quarter, down to one.

    The layers that a ranking chooses may leave many gaps. Others of nearly the same total in a few gaps can do the model
    less harm, and take fewer repairs.

    Args:
        scores: Of shape (layers,).
        positions: The layers that a ranking has chosen.
        candidates: The positions to choose from.

    Returns:
        The sets, ascending, without repetitions; those with more gaps come first.
    """
    wanted, gaps = [], num_gaps(positions)
    while gaps > 1:
        gaps = math.ceil(gaps / 2)
        wanted.append(gaps)
    found = _lowest_by_gaps(scores.tolist(), len(positions), max(wanted, default=0), set(candidates))
    return [list(one) for one in dict.fromkeys(found[gaps] for gaps in wanted if gaps in found)]


def num_gaps(positions: Sequence[int]) -> int:
    """The number of runs of successive layers among these."""
    return sum(position - 1 not in positions for position in positions)


def _lowest_by_gaps(scores: Sequence[float], count: int, most: int, candidates: set[int]) -> dict[int, tuple[int, ...]]:
    """For each number of gaps up to `most`, the `count` candidates of the lowest total that leave at most so many."""
    # by layers chosen, gaps, and whether the layer before was chosen: the lowest total so far, and its layers
    best: dict[tuple[int, int, bool], tuple[float, tuple[int, ...]]] = {(0, 0, False): (0.0, ())}
    for position, score in enumerate(scores):
        after: dict[tuple[int, int, bool], tuple[float, tuple[int, ...]]] = {}
        for (chosen, gaps, inside), (total, layers) in best.items():
            ways = [((chosen, gaps, False), (total, layers))]
            if position in candidates and chosen < count and (inside or gaps < most):
                ways.append(((chosen + 1, gaps + (not inside), True), (total + score, (*layers, position))))
            for state, way in ways:
                after[state] = min(way, after.get(state, way))
        best = after
    found: dict[int, tuple[int, ...]] = {}
    for allowed in range(1, most + 1):
        whole = [way for (chosen, gaps, _), way in best.items() if chosen == count and gaps <= allowed]
        if whole:
            found[allowed] = min(whole)[1]
    return found


def choose_window(scores: torch.Tensor, count: int, protect_first: int, protect_last: int) -> Chosen:
    """The window of `count` successive layers with the lowest score.

    Args:
        scores: The score of each window, by its first layer: of shape (layers - count + 1,).
        count: Layers per window.
        protect_first: Number of layers at the input side to keep.
        protect_last: Number of layers at the output side to keep.
    """
    first = choose(scores, 1, protect_first, protect_last)
    (start,) = first.positions
    return Chosen(list(range(start, start + count)), first.scores * count, first.margin)


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
