"""`trimllm trim`: writes a checkpoint that keeps some layers of a base, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, answer, app


@app.command()
def trim(
    base: Annotated[str, typer.Argument(help="Hub id or folder of the base model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    kept: Annotated[str | None, typer.Option(help="Layers to keep, by the base's numbering from 0: 0-11,20-31.")] = None,
    drop: Annotated[str | None, typer.Option(help="Layers to drop, instead of --kept.")] = None,
    part: Annotated[str | None, typer.Option(help="Of an encoder-decoder: decoder (the default) or encoder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Refuse drops after which some runtimes infer wrong layer types.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code stored beside the base's weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint that keeps some layers of a base; only their tensors are read from its files.

    `trimllm score` shows which layers matter on your data. Quality is likely to be lower until the model is fine-tuned.

    **Example:** `trimllm trim --kept 0-11,20-31 org/base runs/trimmed`
    """
    if (kept is None) == (drop is None):
        raise typer.BadParameter("Give exactly one of --kept and --drop.", param_hint="--kept")
    named = layers(kept or drop or "", "--drop" if kept is None else "--kept")
    from transformers import AutoConfig

    from ..layer_map import num_hidden_layers
    from ..loading.trimmed_folder import write_kept_layers
    from ..publish.figures import text_strip
    from ..publish.folder import describe_weights

    if kept is None:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
        depth = num_hidden_layers(config, part)
        if missing := [layer for layer in named if layer >= depth]:
            raise ValueError(f"Expected layers from 0 to {depth - 1} (the base has {depth}), got {missing} to drop.")
        if repeated := sorted({layer for layer in named if named.count(layer) > 1}):
            raise ValueError(f"Expected each layer to drop once, got {repeated} more than once. Check the list.")
        if len(named) == depth:
            raise ValueError(f"Expected at least one of the {depth} layers to stay, got all of them to drop.")
        named = [layer for layer in range(depth) if layer not in set(named)]
    layer_map = write_kept_layers(
        base, named, out, part=part, portable=portable, revision=revision, trust_remote_code=trust_remote_code
    )
    plain = {"folder": str(out), "map": layer_map.to_dict(), "weights": describe_weights(out)}
    said = f"{out}: {layer_map.num_layers} of {layer_map.base_num_layers} layers of {base}"
    answer(plain, as_json, lambda: [said, text_strip(layer_map)])


def layers(text: str, option: str) -> list[int]:
    """The layers named by a text like `0-11,20`.

    Raises:
        typer.BadParameter: If it names none, or is not a list of numbers and ranges.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)) or (dash and int(first) > int(last)):
            said = f"Expected layers like 0-11,20-31, got {part.strip() or text!r}."
            raise typer.BadParameter(said, param_hint=option)
        if int(last or first) >= 100_000:
            raise typer.BadParameter(f"Expected layers of a model, got {part.strip()}.", param_hint=option)
        found += range(int(first), int(last or first) + 1)
    return found
