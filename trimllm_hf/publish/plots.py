"""The pictures of a card: which layers are kept, and what the metric did as the model got shallower."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..layer_map import LayerMap
from .card_data import TrimCardData
from .figures import map_of
from .widths import Widths, widths_of

logger = logging.get_logger("transformers.trimllm_hf")

STRIP, CURVE, WIDTHS = "trim_layers.png", "trim_curve.png", "trim_widths.png"
KEPT, DROPPED, INK = "#1f5f99", "#e9ecef", "#343a40"
CELLS_PER_ROW = 16  # a card is about 750 pixels wide: more would be too small to read
SCORES = {"sensitivity": "loss on the calibration set"}  # what the score of a dropped layer is: the model's without it


@dataclass(frozen=True)
class Curve:
    """A metric at each depth.

    Attributes:
        what: The metric, in words.
        points: Depth and value, in the order of the run.
        evaluated: Whether the points are evaluations, and not scores of dropped layers.
    """

    what: str
    points: tuple[tuple[int, float], ...]
    evaluated: bool


def draw(data: TrimCardData, folder: Path) -> list[str]:
    """Draw the pictures that the data allow into a folder, as PNG; returns their names. Without matplotlib: none."""
    if data.trimmed is None:
        return []
    if find_spec("matplotlib") is None:
        logger.warning("The card has no pictures: matplotlib is not installed. pip install 'trimllm_hf[plot]'")
        return []
    drawn = [STRIP]
    _save(_strip(map_of(data)), folder / STRIP)
    if widths := widths_of(data.trimmed.get("slicing")):
        _save(_widths(widths), folder / WIDTHS)
        drawn.append(WIDTHS)
    if curve := curve_of(data):
        _save(_curve(curve), folder / CURVE)
        drawn.append(CURVE)
    return drawn


def _widths(widths: Widths) -> Any:
    """One bar per layer: the width that is left."""
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    figure = Figure(figsize=(max(4.0, 0.25 * len(widths.kept)), 2.2), layout="constrained")
    axes = figure.subplots()
    layers = range(len(widths.kept))
    axes.bar(layers, [widths.full] * len(widths.kept), color=DROPPED)
    axes.bar(layers, widths.kept, color=KEPT)
    axes.set_xlabel("layer")
    axes.set_ylabel(widths.of)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve_of(data: TrimCardData) -> Curve | None:
    """The metric against depth, from the Trainer's log: evaluations if there are some at several depths.

    Else the scores of the dropped layers, where such a score is the calibration loss of the model without the layer. None if
    the log has neither.
    """
    if data.training is None or data.trimmed is None:
        return None
    log, base = data.training["log"], data.trimmed["map"]["base_num_layers"]
    metric = data.training.get("metric") or "eval_loss"
    depth, evaluated, scored = data.training.get("start_num_layers") or base, [], []
    for entry in log:
        if "trim/num_layers" in entry:
            depth = entry["trim/num_layers"]
        if "trim/score" in entry:  # layers that come back have none
            scored.append((depth, entry["trim/score"]))
        if metric in entry:
            evaluated.append((depth, entry[metric]))
    if len({depth for depth, _ in evaluated}) > 1:
        return Curve(f"{metric.removeprefix('eval_').replace('_', ' ')} on the evaluation set", tuple(evaluated), True)
    if len(scored) > 1 and (what := score_in_words(map_of(data))):
        return Curve(f"{what}, right after each drop", tuple(scored), False)
    return None


def score_in_words(layer_map: LayerMap) -> str | None:
    """What the scores in a map's history measure, if all are of one importance that has a description."""
    names = {record.importance for record in layer_map.history}
    return SCORES.get(names.pop() or "") if len(names) == 1 else None


def _strip(layer_map: LayerMap) -> Any:
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


def _curve(curve: Curve) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curve.points, strict=True), marker="o", markersize=5, linewidth=1.4, color=KEPT)
    depth, value = curve.points[-1]
    axes.annotate(f"at the end {value:.3g}", (depth, value), (-8, 0), textcoords="offset points", ha="right", va="center")
    axes.invert_xaxis()  # time runs to the right: the model gets shallower
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers left")
    axes.set_ylabel(curve.what.partition(",")[0])
    axes.grid(axis="y", color=DROPPED)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})  # no version in it: the same data give the same file
