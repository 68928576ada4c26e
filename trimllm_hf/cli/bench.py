"""`trimllm bench`: the speed of a model, compared with its base and with the ratio of weight bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, answer, app, refuse_unwritable, table


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    base: Annotated[str | None, typer.Option(help="Its base; by default the one that its map names.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Measure the model without its base.")] = False,
    batch_size: Annotated[list[int] | None, typer.Option(help="Batch size; can be repeated. Default: 1.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds; with 6 or more the interval covers 95%.")] = 10,
    warmup: Annotated[int, typer.Option(help="Untimed rounds before them.")] = 2,
    cache: Annotated[str, typer.Option(help="dynamic or static.")] = "dynamic",
    compile: Annotated[bool, typer.Option("--compile", help="Compile decoding; needs --cache static and a GPU.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the accelerator by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32, …; the config's by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure latency and memory of a model and its base, alternately; with random weights, since only shapes matter.

    **Example:** `trimllm bench runs/medical --batch-size 1 --batch-size 8`
    """
    if out is not None:
        refuse_unwritable(out.parent)
    from transformers import AutoConfig

    from ..layer_map import LayerMap
    from ..publish.measure import measure_pair
    from ..slicing.slice_map import SliceMap

    revision = None
    if base is None and not alone:
        config = AutoConfig.from_pretrained(model)
        layer_map = LayerMap.from_config(config)
        of: Any = layer_map if layer_map.dropped_layers else SliceMap.from_config(config)
        if of is not None and of.base_model is None:
            raise ValueError(f"Expected {model} to name its base, got a map that does not. Give --base, or --alone.")
        base, revision = (None, None) if of is None else (of.base_model, of.base_revision)
    report = measure_pair(
        model, base, revision, device, dtype, batch_sizes=batch_size or [1], prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, repeats=repeats, warmup=warmup, cache=cache, compile=compile, progress=not as_json,
    )  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report.to_json(out)
    answer(report.to_dict(), as_json, lambda: _shown(report))


def _shown(report: Any) -> list[Any]:
    from ..publish.figures import speed_rows

    runs = zip(report.base_runs or [None] * len(report.runs), report.runs, strict=True)
    rows = [row for base, ours in runs for row in speed_rows(report, base, ours)]
    if not report.base_runs:
        rows = [(what, ours) for what, _, ours, _ in rows]
    heads = ("base", "model", "change") if report.base_runs else ("model",)
    env = report.environment
    said = f"{env['device_name']}, {env['threads']} thread(s), {env['dtype']}, attention {env['attention']}, "
    said += f"torch {env['torch']}, transformers {env['transformers']}"
    return [table(None, "", *heads, rows=rows), said]
