"""Importance per millisecond: an attention and an MLP do not take the same time, and time is what a drop saves.

TrimLLM leaves this to future work (arXiv 2412.11242). It takes a score that measures the cost of a layer's absence, with 0
for a layer that is free to drop, and divides that cost by the time that the absence saves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch


def per_ms(scores: torch.Tensor, of_none: float, ms: Sequence[float]) -> torch.Tensor:
    """What the model loses without each layer, per ms saved; the layer with the lowest value is dropped first.

    If the model is *better* without a layer, the score is minus the gain times the ms, since both favour dropping it. If
    all layers take the same time, the order of the scores is unchanged.

    Args:
        scores: Of shape (layers,), higher = more important.
        of_none: The score of a layer whose absence changes nothing.
        ms: The time that each layer takes.

    Raises:
        ValueError: If there is not a positive time for each layer.
    """
    if len(ms) != len(scores) or not all(math.isfinite(time) and time > 0 for time in ms):
        raise ValueError(f"Expected a time above 0 ms for each of {len(scores)} layers, got {list(ms)}.")
    lost, times = scores - of_none, torch.tensor(ms, dtype=scores.dtype)
    return torch.where(lost > 0, lost / times, lost * times)


def refuse_without_zero(name: str, with_zero: Collection[str]) -> None:
    """Refuse a score whose value for a layer without effect is unknown.

    Raises:
        ValueError: With the scores that are available per ms.
    """
    if name not in with_zero:
        raise ValueError(
            f"Expected one of {sorted(with_zero)} for importance_per_ms, whose scores say what the model loses without a "
            f"layer, got {name!r}. Its numbers only rank: divided by a time they would mean nothing."
        )
