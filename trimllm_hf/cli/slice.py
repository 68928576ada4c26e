"""`trimllm slice`: writes a checkpoint with narrower layers, from a base and calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, answer, app


@app.command()
def slice(
    base: Annotated[str, typer.Argument(help="Hub id or folder of a causal language model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    data: Annotated[Path, typer.Option(help="Calibration text: JSON Lines (text; or prompt, completion), or plain text.")],
    ratio: Annotated[float, typer.Option(help="Mean share of the width to cut.")] = 0.25,
    allocation: Annotated[str, typer.Option(help="redundancy, or uniform: all layers alike.")] = "redundancy",
    spread: Annotated[float, typer.Option(help="How far widths follow redundancy, from 0 to 1.")] = 0.5,
    mean: Annotated[
        str, typer.Option(help="What the ratio is a mean over: layers, or parameters of the blocks.")
    ] = "layers",
    what: Annotated[str, typer.Option(help="hidden: the hidden states. mlp: the MLPs' channels alone.")] = "hidden",
    multiple: Annotated[int, typer.Option(help="Widths are multiples of this: 8, or 64.")] = 8,
    untie: Annotated[bool, typer.Option(help="Whether a head tied to the embedding may become a matrix of its own.")] = True,
    size: Annotated[int, typer.Option(help="Number of examples, from the start of the file.")] = 128,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of an example.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 4,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Also write the code with which trust_remote_code=True loads the model.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the accelerator by default.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, …; auto: as in the files.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write a checkpoint whose layers are narrower: SliceGPT with a width for each layer, by its redundancy on your text.

    It loads with the Auto classes after `import trimllm_hf`. Fine-tune it with any Trainer: until then its quality is lower.

    **Example:** `trimllm slice org/base runs/sliced --ratio 0.25 --data train.jsonl`
    """
    for option, value in (("--size", size), ("--batch-size", batch_size), ("--max-length", max_length - 1)):
        if value < 1:
            raise typer.BadParameter("Expected a number that leaves something to calibrate by.", param_hint=option)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected a folder that is new or empty, got {out}. Nothing was written.")
    from ..slicing.preconditions import refuse_arguments
    from .examples import make_batches, read_examples

    refuse_arguments(ratio, allocation, spread, mean, multiple, what)
    examples = read_examples(data, size)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..publish.folder import describe_weights
    from ..publish.widths import text_widths, widths_of
    from ..slicing.slice_model import slice_model
    from ..surgery.remote_code import write_remote_code
    from .score import _dtype

    model: Any = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=_dtype(dtype))
    model.to(device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    batches = make_batches(tokenizer, examples, max_length, batch_size)
    found = slice_model(model, batches, ratio, allocation, spread, mean, multiple, what, untie, progress=not as_json)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if remote_code and hasattr(type(model.config), "custom"):
        write_remote_code(out)
    plain = {"folder": str(out), "map": found.to_dict(), "weights": describe_weights(out)}
    shown = widths_of(found.to_dict())
    answer(plain, as_json, lambda: [f"{out}: {shown}", text_widths(found.width, found.widths)])
