"""`trimllm export`: a checkpoint in another runtime's format, by its own converter, compared with transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, answer, app


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a causal language model.")],
    to: Annotated[str, typer.Option(help="gguf, onnx, openvino, mlx or ctranslate2.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write, new or empty. Default: FOLDER-TO beside it.")] = None,
    quantize: Annotated[str | None, typer.Option(help="gguf: Q8_0, Q4_K_M, …; the others: int8. Default: not.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16. Default: float32; gguf: float16.")] = None,
    python: Annotated[str | None, typer.Option(help="An interpreter that has the tools. Default: this one.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="For gguf: a folder of llama.cpp, with its converter.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint for another runtime, by that runtime's own tool, and compare what it computes.

    What the runtime would take for another model is refused. What differs from transformers is not kept.

    **Example:** `trimllm export runs/medical --to gguf --quantize Q4_K_M`
    """
    from ..publish.exports import export_model

    target = out or folder.absolute().parent / f"{folder.absolute().name}-{to}"
    found = export_model(folder, to, target, quantize, dtype, python, llama_cpp)
    answer(asdict(found), as_json, lambda: _shown(found))


def _shown(found: Any) -> list[Any]:
    from ..utils import format_bytes

    shown = [f"{found.folder}: {found.quantize or found.dtype}, {format_bytes(found.bytes)}"]
    shown.append(f"{found.dtype}: {found.comparison}")
    if found.quantized is not None:
        shown.append(f"{found.quantize}: {found.quantized}")
    return [*shown, ", ".join(f"{name} {version}" for name, version in found.versions.items())]
