"""`trimllm report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, answer, app, refuse_unwritable


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run: a Trainer's output_dir.")],
    out: Annotated[Path | None, typer.Option(help="File to write; by default trim_run.html in that folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a page about a run: loss and depth over the steps, dropped layers, scores, size, speed and quality.

    The page is one file that needs no network and follows the browser's light or dark mode. Nothing is measured: it shows
    what trainer_state.json and, if a card was written, trim_report.json contain.

    **Example:** `trimllm report runs/medical`
    """
    from ..publish.run_page import read_run, render_run

    page = out or run / "trim_run.html"
    record = read_run(run)
    refuse_unwritable(page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_run(record), encoding="utf-8")
    kept = f"{record.layer_map.num_layers} of {record.layer_map.base_num_layers} layers"
    plain = {"page": str(page), "map": record.layer_map.to_dict(), "entries": len(record.log)}
    answer(plain, as_json, lambda: f"{page}: {kept}, {len(record.log)} entries of the log")
