"""The pictures by which a person decides: which layers go, what they are worth, what it costs and buys."""

from .card import CURVE, IMPORTANCE, LOSS, STRIP, WHAT_IF, WIDTHS, draw, first_scan
from .depth import curve_of, score_in_words
from .importance import importance_figure, scan_figure
from .layers import strip_figure
from .style import COLOURS, DROPPED, INK, KEPT, MARK, dress, refuse_no_matplotlib, save
from .training_time import drop_times, loss_over_time
from .what_if import what_if_figure

__all__ = [
    "COLOURS",
    "CURVE",
    "DROPPED",
    "IMPORTANCE",
    "INK",
    "KEPT",
    "LOSS",
    "MARK",
    "STRIP",
    "WHAT_IF",
    "WIDTHS",
    "curve_of",
    "draw",
    "dress",
    "drop_times",
    "first_scan",
    "importance_figure",
    "loss_over_time",
    "refuse_no_matplotlib",
    "save",
    "scan_figure",
    "score_in_words",
    "strip_figure",
    "what_if_figure",
]
