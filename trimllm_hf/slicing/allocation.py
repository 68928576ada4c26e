"""How wide each layer becomes, by how redundant it is, so that the mean share that is cut is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .slice_map import LEAST_WIDTH

LARGEST_SHARE = 0.6  # no layer loses more, unless the mean is higher


def redundancy_of(influence: Sequence[float]) -> list[float]:
    """The layers' redundancy, from 0 to 1, by their block influence: 1 minus its min-max over the layers.

    Dynamic LLM Slicing (arXiv 2411.03513, section 3.1). Layers that are all alike are all redundant.
    """
    lowest, highest = min(influence), max(influence)
    if highest <= lowest:
        return [1.0] * len(influence)
    return [1 - (value - lowest) / (highest - lowest) for value in influence]


def shares_of(redundancy: Sequence[float], mean: float, spread: float) -> list[float]:
    """The share to cut of each layer: base + (mean - base) LR / mean(LR), with base = (1 - spread) mean.

    By Dynamic LLM Slicing (arXiv 2411.03513, section 3.2). What it lacks: shares are kept within 0 and `LARGEST_SHARE`,
    and what that takes away is given to the other layers, so that their mean holds.

    Args:
        redundancy: The layers' redundancy, at least 0.
        mean: The mean share, within 0 and 1.
        spread: From 0 (uniform) to 1 (a layer without redundancy keeps its width).
    """
    average = sum(redundancy) / len(redundancy)
    base = (1 - spread) * mean if average > 0 else mean
    shares = [base + (mean - base) * value / average if average > 0 else mean for value in redundancy]
    largest = max(LARGEST_SHARE, mean)
    for _ in shares:  # each turn clips at least one layer more, or ends
        excess = sum(share - min(share, largest) for share in shares)
        shares = [min(share, largest) for share in shares]
        room = [largest - share for share in shares]
        if excess <= 1e-12 or sum(room) <= 0:
            break
        shares = [share + excess * free / sum(room) for share, free in zip(shares, room, strict=True)]
    return shares


def widths_of(shares: Sequence[float], width: int, multiple: int) -> list[int]:
    """Widths in multiples of a number, that together keep what the shares keep.

    Args:
        shares: The share to cut of each layer.
        width: What every layer is wide now.
        multiple: What widths are multiples of; only a layer that keeps all of a width that is none may be another one.

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
    narrow = [layer for layer, value in enumerate(found) if value < LEAST_WIDTH]
    if narrow:
        raise ValueError(
            f"Expected a ratio that leaves each layer at least {LEAST_WIDTH} wide, got one by which the layers {narrow} of "
            f"a width of {width} would be narrower. Lower the ratio, or the spread."
        )
    return found


def allocate(
    redundancy: Sequence[float],
    width: int,
    ratio: float,
    spread: float,
    multiple: int = 8,
    cost: Callable[[Sequence[int]], float] | None = None,
) -> list[int]:
    """The layers' widths.

    Args:
        redundancy: The layers' redundancy, from 0 to 1.
        width: What every layer is wide now.
        ratio: The mean share to cut: of the layers' widths, or, with `cost`, of what it counts.
        spread: See `shares_of`.
        multiple: See `widths_of`.
        cost: The share of the layers' parameters that is left at such widths. None: the mean is that of the layers.

    Raises:
        ValueError: If a layer would be narrower than 8, or no widths cost so little.
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
