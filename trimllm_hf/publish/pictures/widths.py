"""The width of each layer of a sliced model."""

from __future__ import annotations

from typing import Any

from ..widths import Widths
from .style import DROPPED, KEPT, dress


def widths_figure(widths: Widths) -> Any:
    """One bar per layer: the width that is left."""
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    figure = Figure(figsize=(max(4.0, 0.25 * len(widths.kept)), 2.2), layout="constrained")
    axes = figure.subplots()
    layers = range(len(widths.kept))
    axes.bar(layers, [widths.full] * len(widths.kept), color=DROPPED)
    axes.bar(layers, widths.kept, color=KEPT)
    dress(axes, "layer", widths.of)
    return figure
