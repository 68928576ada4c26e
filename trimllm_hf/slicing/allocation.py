"""Allocates a width to each layer by its redundancy, such that the mean share cut is the requested ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .slice_map import LEAST_WIDTH

LARGEST_SHARE = 0.6  # no layer loses more, unless the mean is larger


def redundancy_of(influence: Sequence[float]) -> list[float]:
    """The layers' redundancy, from 0 to 1: 1 minus their block influence, min-max normalized over the layers.

    Dynamic LLM Slicing (arXiv 2411.03513, section 3.1). If all layers have the same influence, all are redundant.
    """
    lowest, highest = min(influence), max(influence)
    if highest <= lowest:
        return [1.0] * len(influence)
    return [1 - (value - lowest) / (highest - lowest) for value in influence]


def shares_of(redundancy: Sequence[float], mean: float, spread: float) -> list[float]:
    """The share to cut of each layer: base + (mean - base) LR / mean(LR), with base = (1 - spread) mean.

    Follows Dynamic LLM Slicing (arXiv 2411.03513, section 3.2). In addition, shares are clipped to between 0 and
    `LARGEST_SHARE`, and the difference is redistributed over the other layers, so that the mean is kept.

    Args:
        redundancy: The layers' redundancy, at least 0.
        mean: The mean share, between 0 and 1.
        spread: From 0 (uniform) to 1 (a layer without redundancy keeps its width).
    """
    average = sum(redundancy) / len(redundancy)
    base = (1 - spread) * mean if average > 0 else mean
    shares = [base + (mean - base) * value / average if average > 0 else mean for value in redundancy]
    largest = max(LARGEST_SHARE, mean)
    for _ in shares:  # each iteration clips at least one more layer, or ends
        excess = sum(share - min(share, largest) for share in shares)
        shares = [min(share, largest) for share in shares]
        room = [largest - share for share in shares]
        if excess <= 1e-12 or sum(room) <= 0:
            break
        shares = [share + excess * free / sum(room) for share, free in zip(shares, room, strict=True)]
    return shares


def widths_of(shares: Sequence[float], width: int, multiple: int) -> list[int]:
    """Widths rounded to multiples of a number, whose sum is what the shares leave.

    Args:
        shares: The share to cut of each layer.
        width: The current width of every layer.
        multiple: What widths are multiples of. Only a layer that keeps its full width may have a width that is not.

    Raises:
        ValueError: If a layer would be narrower than 8.
    """
    most = width // multiple
    exact = [(1 - share) * width / multiple for share in shares]
    units = [min(int(value), most) for value in exact]
    missing = round(sum(exact)) - sum(units)
    order = sorted(range(len(units)), key=lambda layer: (units[layer] - exact[layer], layer))
    for layer in order:  # the largest remainders first
        if missing > 0 and units[layer] < most:
            units[layer] += 1
            missing -= 1
    found = [width if unit == most else unit * multiple for unit in units]
    refuse_narrow(found, width)
    return found


def refuse_narrow(widths: Sequence[int], width: int) -> None:
    """Refuse widths below 8.

    Args:
        widths: Of each layer.
        width: The current width of every layer.

    Raises:
        ValueError: If one is.
    """
    narrow = [layer for layer, value in enumerate(widths) if value < LEAST_WIDTH]
    if narrow:
        raise ValueError(
            f"Expected a ratio that leaves each layer at least {LEAST_WIDTH} wide, got one by which the layers {narrow} of "
            f"a width of {width} would be narrower. Lower the ratio, or the spread."
        )


def allocate(
    redundancy: Sequence[float],
    width: int,
    ratio: float,
    spread: float,
    multiple: int = 8,
    cost: Callable[[Sequence[int]], float] | None = None,
) -> list[int]:
    """Compute the width of each layer.

    Args:
        redundancy: The layers' redundancy, from 0 to 1.
        width: The current width of every layer.
        ratio: The mean share to cut: of the layers' widths, or, with `cost`, of what `cost` counts.
        spread: See `shares_of`.
        multiple: See `widths_of`.
        cost: Returns the share of the layers' parameters that is left at given widths. None: the mean is over the layers.

    Raises:
        ValueError: If a layer would be narrower than 8, or no widths have a cost that low.
    """
    if cost is None:
        return widths_of(shares_of(redundancy, ratio, spread), width, multiple)
    low, high = 0.0, 1 - LEAST_WIDTH / width
    found: list[int] | None = None
    for _ in range(30):  # the cost falls with the mean share
        middle = (low + high) / 2
        try:
            tried = widths_of(shares_of(redundancy, middle, spread), width, multiple)
        except ValueError:
            high = middle
            continue
        if cost(tried) > 1 - ratio:
            low = middle
        else:
            high, found = middle, tried
    if found is None:
        raise ValueError(
            f"Expected a ratio that leaves each layer at least {LEAST_WIDTH} wide, got {ratio} of the parameters of layers "
            f"{width} wide. Lower the ratio, or the spread."
        )
    return found
