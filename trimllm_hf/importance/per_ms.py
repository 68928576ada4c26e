"""Importance per millisecond: an attention and an MLP do not cost the same, and what a drop buys is time.

TrimLLM leaves it to future work (arXiv 2412.11242). It takes a score that says what a layer's absence costs, so that 0
means free to drop, and divides that cost by the time that the absence saves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch


def per_ms(scores: torch.Tensor, of_none: float, ms: Sequence[float]) -> torch.Tensor:
    """What the model loses without each layer, for each ms that this saves; the lowest goes first.

    A layer without which the model is *better* has its gain times its ms, as a negative score: both speak for its going.
    Where all layers take the same time, the order of the scores stays what it was.

    Args:
        scores: Of shape (layers,), higher = more important.
        of_none: The score of a layer whose absence changes nothing.
        ms: The time that each layer takes.

    Raises:
        ValueError: If there is not a time above 0 for each layer.
    """
    if len(ms) != len(scores) or not all(math.isfinite(time) and time > 0 for time in ms):
        raise ValueError(f"Expected a time above 0 ms for each of {len(scores)} layers, got {list(ms)}.")
    lost, times = scores - of_none, torch.tensor(ms, dtype=scores.dtype)
    return torch.where(lost > 0, lost / times, lost * times)


def refuse_without_zero(name: str, with_zero: Collection[str]) -> None:
    """Refuse a score of which it is not known what it says of a layer whose absence changes nothing.

    Raises:
        ValueError: With those that can be had per ms.
    """
    if name not in with_zero:
        raise ValueError(
            f"Expected one of {sorted(with_zero)} for importance_per_ms, whose scores say what the model loses without a "
            f"layer, got {name!r}. Its numbers only rank: divided by a time they would mean nothing."
        )
