"""The pictures of a card."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...latency.depths import Depth, depths_between
from ...loading.readers import unknown_to_stock
from ..card_data import TrimCardData
from ..figures import latency_of, map_of
from ..widths import widths_of
from .depth import curve_figure, curve_of
from .importance import scan_figure
from .layers import strip_figure
from .style import save
from .training_time import drop_times, loss_over_time
from .what_if import what_if_figure
from .widths import widths_figure

logger = logging.get_logger("transformers.trimllm_hf")

STRIP, CURVE, WIDTHS = "trim_layers.png", "trim_curve.png", "trim_widths.png"
IMPORTANCE, LOSS, WHAT_IF = "trim_importance.png", "trim_loss.png", "trim_what_if.png"


def draw(data: TrimCardData, folder: Path) -> list[str]:
    """Draw the pictures that the data allow into a folder, as PNG; returns their names. Without matplotlib: none."""
    if data.trimmed is None:
        return []
    if find_spec("matplotlib") is None:
        logger.warning("The card has no pictures: matplotlib is not installed. pip install 'trimllm_hf[plot]'")
        return []
    run = data.training or {}
    figures = {STRIP: strip_figure(map_of(data))}
    if widths := widths_of(data.trimmed.get("slicing")):
        figures[WIDTHS] = widths_figure(widths)
    if scan := first_scan(data):
        figures[IMPORTANCE] = scan_figure(scan, map_of(data))
    if curve := curve_of(data):
        figures[CURVE] = curve_figure(curve)
    if loss := loss_over_time(run.get("log") or [], drop_times(run.get("scans") or [])):
        figures[LOSS] = loss
    if depths := depths_of(data):
        figures[WHAT_IF] = what_if_figure(depths, map_of(data).num_layers)
    for name, figure in figures.items():
        save(figure, folder / name)
    return list(figures)


def first_scan(data: TrimCardData) -> dict[str, Any] | None:
    """The first scoring of the run that holds scores: of the most layers."""
    return next((scan for scan in (data.training or {}).get("scans") or [] if scan["scores"]), None)


def depths_of(data: TrimCardData) -> list[Depth]:
    """Every depth of the base, where it and a model of fewer whole layers were measured; else none.

    What sublayers and widths save says nothing about a layer.
    """
    report = latency_of(data)
    if report is None or report.base_sizes is None or report.base_sizes.num_layers <= report.sizes.num_layers:
        return []
    if unknown_to_stock(map_of(data), "slicing" in (data.trimmed or {})):
        return []
    found = depths_between(report.base_sizes, report.sizes)
    least = found[-1]  # of one layer, which is impossible if the dropped ones were heavier than the others
    possible = least.weight_bytes > 0 and (least.byte_bound or 1) > 0 and (least.kv_cache_bytes_per_token or 0) >= 0
    return found if possible else []
