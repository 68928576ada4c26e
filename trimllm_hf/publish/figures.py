"""A card's figures in words: the summary and the rows of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..latency.report import LatencyReport, Run
from ..layer_map import SUBLAYER_KINDS, LayerMap
from ..utils import format_bytes
from .card_data import Quality, Score, TrimCardData
from .widths import widths_of

Rows = list[tuple[str, ...]]
NOT_MEASURED = "not measured"


def summary(data: TrimCardData) -> str:
    """One sentence: the base, how many of its layers are kept, the domain, and the steps after the last drop."""
    layer_map = map_of(data)
    layers = (
        f"{layer_map.num_layers} of its {layer_map.base_num_layers} {f'{layer_map.part} ' if layer_map.part else ''}layers"
    )
    lack = [(sum(missing == kind for _, missing in layer_map.missing_sublayers), kind) for kind in SUBLAYER_KINDS]
    if lacking := ", ".join(f"{count} of them without {kind}" for count, kind in lack if count):
        layers += f" ({lacking})"
    widths = widths_of((data.trimmed or {}).get("slicing"))
    if widths is not None and layer_map.dropped_layers:
        layers += f" kept, and {widths}"
    named = base_name(data)
    said = f"**{named[0].upper()}{named[1:]}** with {layers} kept"
    if widths is not None:
        said = (
            said.removesuffix(" kept")
            if layer_map.dropped_layers
            else f"**{named[0].upper()}{named[1:]}**, sliced: {widths}"
        )
    if data.domain:
        said += f", fine-tuned for {data.domain}"
    run = data.training
    if run and run["steps"]:
        said += f"; {run['steps']:,} training steps"
        if run["healed_steps"] is not None:
            said += f", the last {run['healed_steps']:,} of them after the last layer had gone"
        if run.get("asked_num_layers") is not None:
            said += f"; dropping stopped before the target of {run['asked_num_layers']} layers"
    return said + "."


def text_strip(layer_map: LayerMap) -> str:
    """The base's layers in a row: █ kept, ▀ its attention alone, ▄ its MLP alone, ░ dropped."""
    sublayers = set(layer_map.sublayers)
    shown = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): "░"}
    layers = range(layer_map.base_num_layers)
    return "".join(shown[((layer, "attention") in sublayers, (layer, "mlp") in sublayers)] for layer in layers)


def dropped(layer_map: LayerMap) -> str:
    """The dropped layers and sublayers, in words."""
    gone = [str(layer) for layer in layer_map.dropped_layers]
    gone += [f"the {kind} of {layer_map.kept_layers[position]}" for position, kind in layer_map.missing_sublayers]
    return ", ".join(gone) or "none"


def history_rows(layer_map: LayerMap) -> Rows:
    """Step | dropped | by | score, one row per drop."""
    return [
        (
            "-" if record.step is None else str(record.step),
            ", ".join(
                str(layer) if kind is None else f"{kind} of {layer}"
                for layer, kind in zip(record.dropped, record.sublayers or [None] * len(record.dropped), strict=True)
            ),
            record.importance or "-",
            ", ".join(f"{score:.4f}" for score in record.scores or ()) or "-",
        )
        for record in layer_map.history
    ]


def repair_rows(run: Mapping[str, Any] | None) -> Rows:
    """Step | weights that were refitted | held-out loss of the plain drop | of the repaired one; one row per drop."""
    rows = []
    for repair in (run or {}).get("repairs", ()):
        weights = "; ".join(
            f"`{name}` of {', '.join(map(str, layers))}" for name, layers in repair.get("weights", {}).items()
        )
        left = "; ".join(dict.fromkeys(repair.get("unrepaired", {}).values()))
        losses = [repair.get(name) for name in ("plain_loss", "repaired_loss")]
        rows.append(
            (
                str(repair["step"]),
                (weights or "none, the plain drop stayed") + (f" ({why})" if (why := repair.get("why") or left) else ""),
                *(NOT_MEASURED if loss is None else f"{loss:.4g}" for loss in losses),
            )
        )
    return rows


def base_name(data: TrimCardData) -> str:
    """The base with its revision, linked where it is on the Hub."""
    base = data.base
    if base is None:
        return "a base model that is not known"
    if base.get("id"):
        revision = base.get("revision")
        return f"[{base['id']}](https://huggingface.co/{base['id']})" + (f"@`{revision[:12]}`" if revision else "")
    return f"a local model (`{base['name']}`)"


def cost_rows(data: TrimCardData) -> Rows:
    """What | base | trimmed | change: layers, parameters, bytes, memory, speed; only what is known."""
    assert data.trimmed is not None
    layer_map, ours = map_of(data), data.trimmed["weights"] or {}
    base = (data.base or {}).get("weights") or {}
    rows = [_row("layers", layer_map.base_num_layers, layer_map.num_layers, str)]
    if widths := widths_of(data.trimmed.get("slicing")):
        rows.append(
            _row(f"{widths.of}, mean of the layers", widths.full, sum(widths.kept) / len(widths.kept), "{:.0f}".format)
        )
    if not layer_map.has_all_sublayers:
        rows.append(_row("attentions and MLPs", 2 * layer_map.base_num_layers, layer_map.num_units("sublayer"), str))
    if ours:
        rows.append(_row("parameters", base.get("parameters"), ours["parameters"], "{:,}".format))
        kinds = [", ".join(held["parameters_by_dtype"]) for held in (base, ours) if held]
        what = f"weights on disk ({kinds[0]})" if len(set(kinds)) == 1 else f"weights on disk ({' and '.join(kinds)})"
        rows.append(_row(what, base.get("bytes"), ours["bytes"], format_bytes))
    report = latency_of(data)
    if report is None:
        return rows
    base_sizes = report.base_sizes
    if report.sizes.kv_cache_bytes_per_token is not None:
        theirs = None if base_sizes is None else base_sizes.kv_cache_bytes_per_token
        rows.append(_row("KV cache per token", theirs, report.sizes.kv_cache_bytes_per_token, format_bytes))
    for number, run in enumerate(report.runs):
        rows += speed_rows(report, report.base_runs[number] if report.base_runs else None, run)
    return rows


def speed_rows(report: LatencyReport, base: Run | None, ours: Run) -> Rows:
    """Memory and speed at one batch size: what | base | trimmed | change."""
    at = f"batch {ours.batch_size}"
    rows = [_row(f"peak memory, {at}", getattr(base, "peak_memory_bytes", None), ours.peak_memory_bytes, format_bytes)]
    kinds = {"prefill": "prefill_ms", "forward": "forward_ms"}
    for what, name in kinds.items():
        spread, other = getattr(ours, name), base and getattr(base, name)
        if spread is not None:
            label = f"{'time to first token' if what == 'prefill' else 'forward pass'}, {at}"
            shown = [f"{s.p50:.2f} ms (p90 {s.p90:.2f})" if s else NOT_MEASURED for s in (other, spread)]
            rows.append((label, *shown, _speedup(report, what, ours.batch_size)))
    if ours.decode_tokens_per_s is not None:
        shown = [f"{run.decode_tokens_per_s:.1f} tokens/s" if run else NOT_MEASURED for run in (base, ours)]
        rows.append((f"decoding, {at}", *shown, _speedup(report, "decode", ours.batch_size)))
    return rows


def _speedup(report: LatencyReport, what: str, batch_size: int) -> str:
    found = report.speedup(what, batch_size)
    if found is None:
        return ""
    said = f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] times as fast"
    return said if found.byte_bound is None else f"{said}; {found.byte_bound:.2f} by weight bytes"


def map_of(data: TrimCardData) -> LayerMap:
    """The card's kept-layer map.

    Raises:
        ValueError: If the report holds none, or a damaged one.
    """
    return LayerMap.from_dict((data.trimmed or {}).get("map"))


def latency_of(data: TrimCardData) -> LatencyReport | None:
    """The latency report, if it was measured."""
    if not data.latency or "not_measured" in data.latency:
        return None
    return LatencyReport.from_dict(data.latency)


def quality_rows(measured: Sequence[Quality]) -> Rows:
    """What | n | base | full depth | trimmed, with intervals."""
    rows = []
    for quality in measured:
        where = f"[{quality.dataset}](https://huggingface.co/datasets/{quality.dataset_id})" if quality.dataset_id else ""
        what = f"{quality.metric} on {where or quality.dataset}, {quality.split}"
        scores = [score(each) for each in (quality.base, quality.full, quality.trimmed)]
        rows.append((what, f"{quality.n:,}", *scores))
    return rows


def score(measured: Score | None) -> str:
    """A figure with its interval."""
    if measured is None:
        return NOT_MEASURED
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4g}"
    return f"{measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]"


def _row(what: str, base: float | None, ours: float, shown: Any) -> tuple[str, ...]:
    if base is None:
        return what, NOT_MEASURED, shown(ours), ""
    return what, shown(base), shown(ours), f"{(ours - base) / base:+.0%}" if base else ""
