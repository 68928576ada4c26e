"""The loss against the time that training took, with the drops marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .style import INK, KEPT, MARK, dress

SECONDS = "trim/seconds"  # in the records of a run's log
UNITS = ((7200, 3600, "h"), (180, 60, "min"), (0, 1, "s"))  # from so many seconds on, in what


def loss_over_time(log: Sequence[dict[str, Any]], drops: Sequence[tuple[float, int]]) -> Any | None:
    """Training and evaluation loss over the time since the run began, scoring and drops included.

    Args:
        log: The Trainer's log; records without a time, of other runs, are left out.
        drops: When layers went, in seconds, and the depth after it.

    Returns:
        The figure; None where the log has no loss at two times.
    """
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    found = {name: timed(log, name) for name in ("loss", "eval_loss")}
    if max(len(points) for points in found.values()) < 2:
        return None
    last = max(seconds for points in found.values() for seconds, _ in points)
    _, factor, unit = next(row for row in UNITS if last >= row[0])
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    names = {"loss": ("training", KEPT), "eval_loss": ("evaluation", MARK)}
    for name, points in found.items():
        label, colour = names[name]
        if points:
            x, y = [seconds / factor for seconds, _ in points], [value for _, value in points]
            axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=3, label=label)
    for number, seconds in enumerate(sorted({seconds for seconds, _ in drops})):
        axes.axvline(seconds / factor, color=INK, linewidth=0.8, linestyle=":", label=None if number else "layers dropped")
    for seconds, depth in _told(drops, last / 20):
        axes.annotate(str(depth), (seconds / factor, 1), (0, 3), xycoords=("data", "axes fraction"), ha="center",
                      textcoords="offset points", fontsize=8, color=INK, annotation_clip=False)  # fmt: skip
    axes.set_xlim(0, None)
    axes.legend(frameon=False, labelcolor=INK)
    dress(axes, f"training time ({unit}); above, the layers left", "loss")
    return figure


def drop_times(scans: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """When the layers of a run went, in seconds, and the depth after it; of what its record says of each drop."""
    return [(float(scan["seconds"]), int(scan["num_layers"])) for scan in scans]


def timed(log: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Times and values of a metric in the log; what is no finite number is left out.

    Records of training have a time. An evaluation has none: it lies between those of the records before and after it, by
    its step, and one before the first is left out.
    """
    known = [(entry["step"], entry[SECONDS]) for entry in log if SECONDS in entry and "step" in entry]
    steps, times = [step for step, _ in known], [seconds for _, seconds in known]
    found = []
    for entry in log:
        value, step = entry.get(name), entry.get("step")
        if step is None or not known or step < steps[0] or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        found.append((float(entry.get(SECONDS, np.interp(step, steps, times))), float(value)))
    return found


def _told(drops: Sequence[tuple[float, int]], apart: float) -> list[tuple[float, int]]:
    """The drops whose depth has room to be written, so many seconds apart: the last, and before it what fits."""
    told: list[tuple[float, int]] = []
    for drop in reversed(drops):
        if not told or told[-1][0] - drop[0] > apart:
            told.append(drop)
    return told
