"""Which layers of a base a model keeps."""

from __future__ import annotations

from typing import Any

from ...layer_map import LayerMap
from .style import DROPPED, INK, KEPT

CELLS_PER_ROW = 16  # a card is about 750 pixels wide: more would be too small to read
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


def strip_figure(layer_map: LayerMap) -> Any:
    """One cell per layer of the base, its upper half the attention: blue if kept; below, the step of its drop."""
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state
    from matplotlib.patches import Rectangle

    depth, sublayers = layer_map.base_num_layers, set(layer_map.sublayers)
    went: dict[int, str] = {}
    for record in layer_map.history:
        for layer in record.dropped if record.step is not None else ():
            went[layer] = f"{went[layer]}, {record.step}" if layer in went else str(record.step)
    columns = min(depth, CELLS_PER_ROW)
    rows = -(-depth // columns)
    figure = Figure(figsize=(0.45 * columns, 0.8 * rows), layout="constrained")
    axes = figure.add_subplot()
    for layer in range(depth):
        x, y = layer % columns, -(layer // columns) * 1.75
        has = [(layer, "mlp") in sublayers, (layer, "attention") in sublayers]  # from the bottom
        for row, kept in enumerate(has):
            color = KEPT if kept else DROPPED
            axes.add_patch(Rectangle((x + 0.04, y + row / 2), 0.92, 0.5, facecolor=color, linewidth=0))
        axes.add_patch(Rectangle((x + 0.04, y), 0.92, 1, fill=False, edgecolor=INK, linewidth=0.6))
        box = None if has[0] == has[1] else {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(x + 0.5, y + 0.5, str(layer), color="white" if all(has) else INK, fontsize=10, bbox=box, **_CENTRED)
        if layer in went:
            axes.text(x + 0.5, y - 0.3, went[layer], color=INK, fontsize=8, **_CENTRED)
    axes.set_xlim(-0.1, columns + 0.1)
    axes.set_ylim(-(rows - 1) * 1.75 - 0.55, 1.15)
    axes.axis("off")
    return figure
