"""The metric against depth, as the model got shallower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...layer_map import LayerMap
from ..card_data import TrimCardData
from ..figures import map_of
from .style import KEPT, dress

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


def curve_figure(curve: Curve) -> Any:
    """The metric against depth; time runs to the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curve.points, strict=True), marker="o", markersize=5, linewidth=1.4, color=KEPT)
    depth, value = curve.points[-1]
    axes.annotate(f"at the end {value:.3g}", (depth, value), (-8, 0), textcoords="offset points", ha="right", va="center")
    axes.invert_xaxis()  # time runs to the right: the model gets shallower
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "layers left", curve.what.partition(",")[0])
    return figure
