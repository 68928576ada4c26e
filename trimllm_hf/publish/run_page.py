"""A run as one HTML page that needs no network: depth and loss over the steps, the layers, scores, speed, quality."""

from __future__ import annotations

import io
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from ..layer_map import TRAINER_STATE, UNITS, LayerMap, run_in
from ..loading.checkpoints import last_complete_checkpoint
from ..loading.readers import readers_of
from ..utils import is_list_of, json_at
from .card import read_report
from .card_data import TrimCardData
from .figures import cost_rows, history_rows, quality_rows, repair_rows, text_strip
from .folder import is_local
from .pictures import (
    COLOURS,
    DROPPED,
    INK,
    KEPT,
    MARK,
    dress,
    drop_times,
    loss_over_time,
    refuse_no_matplotlib,
    scan_figure,
    what_if_figure,
)
from .pictures.card import depths_of

TEMPLATE = Path(__file__).parent / "templates" / "run.html.jinja"

SCAN: dict[str, Any] = {  # what a run records of a scoring
    "step": int, "seconds": int | float, "num_layers": int,
    "dropped": list, "importance": str, "scores": dict, "spread": dict,
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run say.

    Attributes:
        name: The folder's name.
        layer_map: Which layers are kept, and when the others were dropped.
        log: The Trainer's log, oldest first.
        scans: Of each drop its step, seconds since the run began, and what was scored: the importance, and a score and
            its spread by layer name.
        repairs: Of each drop that was to be repaired, what came of it.
        report: The card's report, where a card was written.
        readers: What each other reader makes of the model, where its config is known: reader, verdict, reason.
    """

    name: str
    layer_map: LayerMap
    log: list[dict[str, Any]]
    scans: list[dict[str, Any]] = field(default_factory=list)
    repairs: list[dict[str, Any]] = field(default_factory=list)
    report: TrimCardData | None = None
    readers: list[dict[str, str]] = field(default_factory=list)


def read_run(folder: str | Path) -> RunRecord:
    """What a run has left in a folder: trainer_state.json, there or in its newest checkpoint, and the card's report.

    Raises:
        ValueError: If the folder is not that of a run, its files are damaged, or the run dropped no layer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a run, got {str(folder)!r}, which is not a folder.")
    report = read_report(folder)
    place: Path | None = folder if (folder / TRAINER_STATE).is_file() else None
    if place is None and any(folder.glob("checkpoint-*")):
        place = Path(last_complete_checkpoint(folder))
    if place is None and report is None:
        raise ValueError(
            f"Expected the folder of a run, with {TRAINER_STATE}, a checkpoint or trim_report.json, got {folder}, which has "
            "none of them. Name the output_dir of a Trainer."
        )
    layer_map: LayerMap | None = None
    log: list[dict[str, Any]] = []
    run: dict[str, Any] = {}
    if place is not None:
        layer_map = LayerMap.from_checkpoint(place)
        log = json_at(place / TRAINER_STATE, "log_history") or []
        run = run_in(json_at(place / TRAINER_STATE))
    if report is not None and report.trimmed is not None:
        told = report.training or {}
        reported = told.get("log") or []
        if layer_map is None or (log and reported[:1] == log[:1]):  # of the same run, and to its end
            layer_map = LayerMap.from_dict(report.trimmed["map"])
            log, run = reported, {**run, **told}
    if layer_map is None or not layer_map.history:
        raise ValueError(
            f"Expected a run in which layers were dropped, got {folder}, whose files tell of no drop. Train with "
            "TrimCallback or TrimTrainer."
        )
    readers = (report.trimmed or {}).get("readers") if report is not None else None
    scans, repairs = run.get("scans") or [], run.get("repairs") or []
    if not is_list_of(scans, _is_scan) or not is_list_of(log, lambda entry: isinstance(entry, dict)):
        raise ValueError(f"Expected a log and scorings as a run writes them, got damaged ones in {folder}.")
    return RunRecord(folder.resolve().name, layer_map, log, list(scans), repairs, report, readers or _readers_at(place))


def _is_scan(scan: Any) -> bool:
    if not isinstance(scan, dict) or not all(isinstance(scan.get(name), kind) for name, kind in SCAN.items()):
        return False
    numbers = [*scan["scores"].values(), *scan["spread"].values()]
    named = not scan["spread"] or scan["spread"].keys() == scan["scores"].keys()
    return named and all(isinstance(number, int | float) for number in numbers)


def _readers_at(checkpoint: Path | None) -> list[dict[str, str]]:
    """What each reader makes of a checkpoint; nothing of one without a config that is known here, as a sharded one."""
    if checkpoint is None or not (checkpoint / CONFIG_NAME).is_file():
        return []
    try:
        return [asdict(verdict) for verdict in readers_of(AutoConfig.from_pretrained(checkpoint))]
    except ValueError:  # code beside the weights, which a page does not run
        return []


def render_run(record: RunRecord) -> str:
    """The page of a run: self-contained HTML.

    Raises:
        ValueError: If matplotlib, which draws the figures, is not installed.
    """
    refuse_no_matplotlib()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    data, base = record.report, record.layer_map.base_model or "the base"
    scored = [scan for scan in record.scans if scan["scores"]]
    figures = {"The run": _course(record), "The time it took": loss_over_time(record.log, drop_times(record.scans))}
    if scored:
        figures[f"Importance of the layers, after step {scored[0]['step']}"] = scan_figure(scored[0], record.layer_map)
    if len(scored) > 1:
        figures["Importance at each scoring"] = _scans(scored)
    if data is not None and (depths := depths_of(data)):
        figures["Other depths"] = what_if_figure(depths, record.layer_map.num_layers)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=record,
        map=record.layer_map,
        base=base.rstrip("/").rpartition("/")[2] if is_local(base) else base,  # no path of a machine
        figures={title: _inline(figure) for title, figure in figures.items() if figure is not None},
        strip=text_strip(record.layer_map),
        history=history_rows(record.layer_map),
        cost=cost_rows(data) if data is not None and data.trimmed is not None else [],
        quality=[tuple(map(_plain, row)) for row in quality_rows([*data.quality, *data.outside])]
        if data is not None
        else [],
        repairs=[tuple(cell.replace("`", "") for cell in row) for row in repair_rows({"repairs": record.repairs})],
        readers=[tuple(reader.values()) for reader in record.readers],
        colours=COLOURS,
    )


def _plain(cell: str) -> str:
    """A cell of a card's table without Markdown's links."""
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", cell)


def points(log: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric in the log; values that are not finite are left out."""
    found = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    kept = [(float(x), float(y)) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def drops(layer_map: LayerMap) -> list[tuple[int, int]]:
    """Step and depth after each drop with a known step, in blocks or, by sublayers, in sublayers."""
    a_block = UNITS[layer_map.unit]
    depth, found = layer_map.base_num_layers * a_block, []
    for record in layer_map.history:
        depth -= len(record.dropped) * (a_block if record.sublayers is None else 1)
        if record.step is not None:
            found.append((record.step, depth))
    return found


def _course(record: RunRecord) -> Any:
    """Loss over the steps, the depth below it on the same axis, and a line at each drop."""
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    losses = {name: points(record.log, name) for name in ("loss", "eval_loss")}
    went = drops(record.layer_map)
    if not went and not any(steps for steps, _ in losses.values()):
        return None
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for (label, (steps, values)), colour in zip(losses.items(), (KEPT, MARK), strict=True):
        if steps:
            upper.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=3, label=label)
    if upper.lines:
        upper.legend(frameon=False, labelcolor=INK)
    last = max([step for steps, _ in losses.values() for step in steps] + [step for step, _ in went])
    depth = record.layer_map.base_num_layers * UNITS[record.layer_map.unit]
    lower.step([0, *(step for step, _ in went), last], [depth, *(d for _, d in went), went[-1][1] if went else depth],
               where="post", color=KEPT, linewidth=1.6)  # fmt: skip
    lower.set_ylim(0, depth * 1.05)
    for axes, label in ((upper, "loss"), (lower, "layers left")):
        for step, _ in went:
            axes.axvline(step, color=DROPPED, linewidth=0.8, zorder=0)
        dress(axes, "", label)
    lower.set_xlabel("optimizer step", color=INK)
    return figure


def _scans(scans: list[dict[str, Any]]) -> Any:
    """One row per scoring, one cell per layer: the rank of its score, with the layers that were dropped by it marked."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for scan in scans for name in scan["scores"]))
    figure = Figure(figsize=(max(4.0, 0.3 * len(names)), 0.6 + 0.32 * len(scans)), layout="constrained")
    axes = figure.add_subplot()
    for row, scan in enumerate(scans):
        ordered = sorted(scan["scores"], key=scan["scores"].get)
        for rank, name in enumerate(ordered):
            share = rank / max(1, len(ordered) - 1)
            colour, alpha = (MARK, 1.0) if name in scan["dropped"] else (KEPT, 0.15 + 0.85 * share)
            axes.barh(row, 0.9, left=names.index(name), height=0.8, color=colour, alpha=alpha)
    axes.set_xticks([i + 0.45 for i in range(len(names))], names, fontsize=7, rotation=90 if len(names[0]) > 3 else 0)
    axes.set_yticks(range(len(scans)), [f"step {scan['step']}" for scan in scans], fontsize=7)
    axes.invert_yaxis()
    dress(axes, "layer (darker: more important; red: dropped by it)", "")
    axes.grid(visible=False)
    return figure


def _inline(figure: Any) -> str:
    """A figure as SVG whose colours are the page's variables."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trimllm_hf", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2 width="100%"', svg, count=1)
