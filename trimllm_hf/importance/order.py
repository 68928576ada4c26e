"""From scores to the layers that go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chosen:
    """The layers that go next.

    Attributes:
        positions: Their positions, ascending.
        scores: Their scores, in that order. Of a window, each has the window's.
        margin: By how much the score of the best candidate that stays is higher; None if there is none. About 0 means
            that the choice was a toss-up on these calibration examples.
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
) -> Chosen:
    """The `count` lowest scores among the candidates. Of equal ones the lowest tie score goes, then the deepest.

    Args:
        scores: Of shape (layers,).
        count: How many layers go.
        protect_first: Layers at the input side that stay.
        protect_last: Layers at the output side that stay.
        candidates: The positions to choose from; by default those outside the protected ends.
        tie_scores: Makes the scores that break ties, of the same shape; called only if there is a tie to break.
    """
    if candidates is None:
        candidates = range(protect_first, len(scores) - protect_last)
    values = {position: scores[position].item() for position in candidates}
    lowest = sorted(values.values())
    last_in = lowest[count - 1]
    ties: dict[int, float] = dict.fromkeys(candidates, 0.0)
    if tie_scores is not None and len(lowest) > count and _equal(last_in, lowest[count]):
        breakers = tie_scores()
        ties = {position: breakers[position].item() for position in candidates}
        # equal but for rounding: their order is the tie breaker's
        values = {position: last_in if _equal(value, last_in) else value for position, value in values.items()}
    order = sorted(candidates, key=lambda position: (values[position], ties[position], -position))
    chosen = sorted(order[:count])
    margin = values[order[count]] - values[order[count - 1]] if len(order) > count else None
    return Chosen(chosen, [scores[position].item() for position in chosen], margin)


def choose_window(scores: torch.Tensor, count: int, protect_first: int, protect_last: int) -> Chosen:
    """The `count` successive layers whose window has the lowest score.

    Args:
        scores: Of each window, by its first layer: of shape (layers - count + 1,).
        count: Layers of a window.
        protect_first: Layers at the input side that stay.
        protect_last: Layers at the output side that stay.
    """
    first = choose(scores, 1, protect_first, protect_last)
    (start,) = first.positions
    return Chosen(list(range(start, start + count)), first.scores * count, first.margin)


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
