"""How important each layer is, and how sure that is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...layer_map import LayerMap
from .style import INK, KEPT, MARK, dress


def importance_figure(
    layers: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    spreads: Mapping[str, Sequence[float]],
    marked: Mapping[str, Collection[int]],
    legend: str,
) -> Any:
    """One panel per score, one bar per layer with ± one standard error over the calibration batches.

    Args:
        layers: The layers' names, in the order of their scores.
        scores: By name of the score, one a layer.
        spreads: Of those that have one, the standard errors.
        marked: By name of the score, the positions to be marked.
        legend: What a mark means.
    """
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    figure = Figure(figsize=(max(4.0, 0.3 * len(layers)), 2.4 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), 1, squeeze=False)[:, 0]
    places = range(len(layers))
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        colours = [MARK if place in marked[name] else KEPT for place in places]
        errors = spreads.get(name) or [0.0] * len(values)
        bars = {"capsize": 2, "error_kw": {"ecolor": INK, "elinewidth": 1}} if name in spreads else {}
        axes.bar(places, values, color=colours, yerr=errors if bars else None, **bars)
        _set_limits(axes, values, errors)
        axes.set_xticks(places, layers, rotation=90 if max(map(len, layers)) > 3 else 0, fontsize=8)
        axes.margins(x=0.01)
        dress(axes, "", name.replace("_", " "))
    said = "\nlines: ± one standard error over the batches" if spreads else ""
    cut = "\nan axis does not begin at 0" if any(axes.get_ylim()[0] > 0 for axes in panels) else ""
    panels[-1].set_xlabel(f"layer ({legend}){said}{cut}", color=INK)
    return figure


def _set_limits(axes: Any, values: Sequence[float], errors: Sequence[float]) -> None:
    """Show the differences between the layers that may go; of one far above them, which never does, the number."""
    low, quarter, three_quarters = (sorted(values)[round(share * (len(values) - 1))] for share in (0, 0.25, 0.75))
    far = three_quarters + 4 * (three_quarters - quarter)
    near = [(value, error) for value, error in zip(values, errors, strict=True) if value <= far]
    lowest, highest = min(value - error for value, error in near), max(value + error for value, error in near)
    rise = highest - lowest
    if not rise:
        return
    top = highest + 0.25 * rise if len(near) < len(values) else highest + 0.05 * rise
    bottom = lowest - 0.1 * rise
    axes.set_ylim((0.0 if bottom < 0.5 * highest else bottom) if low > 0 else lowest - 0.05 * rise, top)
    for place, value in enumerate(values):
        if value > far:
            axes.text(place, top, f"{value:.3g} ", rotation=90, ha="center", va="top", color="white", fontsize=8)


def scan_figure(scan: Mapping[str, Any], layer_map: LayerMap) -> Any:
    """The scores of one scan of a run; what is gone at its end is marked.

    Args:
        scan: As a run records it: `scores` by the layers' names, `spread` likewise, `importance`.
        layer_map: What is kept at the end.
    """
    names, name = list(scan["scores"]), scan["importance"]
    kept = {str(layer) for layer in layer_map.kept_layers} | {f"{kind} {layer}" for layer, kind in layer_map.sublayers}
    spreads = {name: [scan["spread"][each] for each in names]} if scan.get("spread") else {}
    gone = {name: [place for place, each in enumerate(names) if each not in kept]}
    return importance_figure(names, {name: list(scan["scores"].values())}, spreads, gone, "red: gone at the end")
