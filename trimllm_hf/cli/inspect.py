"""`trimllm inspect`: describes a model by its config and the headers of its weight files; no weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from .app import Json, answer, app, refuse_unwritable, table


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="Print the size of the model at every depth.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --what-if: a .png or .svg file to draw the sizes into.")] = None,
    as_json: Json = False,
) -> None:
    """Print which layers of its base a model keeps, when the others were dropped, and its size.

    Only config.json and the headers of the weight files are read: a few kilobytes for a model on the Hub. With --what-if
    only config.json is read, and for every depth the parameters, bytes, cache per token and the ratio of the weight bytes
    read per token are printed. For an adapter (PEFT), the layers of the base that it belongs to are printed.

    **Examples:** `trimllm inspect runs/medical`, `trimllm inspect org/base --what-if`
    """
    from transformers import AutoConfig

    from ..layer_map import LayerMap
    from ..loading.readers import readers_of
    from ..publish.figures import text_strip
    from ..publish.folder import describe_weights
    from ..slicing.slice_map import SliceMap

    adapter = _adapter(model, revision)
    readers: list[dict[str, str]] = []
    if adapter is not None:
        kind, layer_map, weights = adapter
        trimmed = bool(layer_map.dropped_layers or layer_map.missing_sublayers)
    else:
        config = AutoConfig.from_pretrained(model, revision=revision)
        if what_if:
            _what_if(model, config, picture, as_json)
            return
        kind, layer_map, trimmed = config.model_type, LayerMap.from_config(config), getattr(config, "trim", None) is not None
        weights = describe_weights(model, revision)
        readers = [asdict(verdict) for verdict in readers_of(config)]
    slices = None if adapter is not None else SliceMap.from_config(config)
    plain = {
        "model": model,
        "model_type": kind,
        "trimmed": trimmed,
        "sliced": None if slices is None else slices.to_dict(),
        "strip": text_strip(layer_map),
        "num_layers": layer_map.num_layers,
        "dropped_layers": layer_map.dropped_layers,
        "map": layer_map.to_dict(),
        "weights": weights,
        "readers": readers,
    }
    answer(plain, as_json, lambda: [*_shown(plain, layer_map), *([] if slices is None else _widths(slices))])


def _widths(slices: Any) -> list[RenderableType]:
    from ..publish.widths import text_widths, widths_of

    rows = [
        (layer, width, f"{1 - width / slices.width:.0%}", f"{slices.redundancy[layer]:.4f}" if slices.redundancy else "-")
        for layer, width in enumerate(slices.widths)
    ]
    base = slices.base_model or "a base that is not named"
    return [
        f"sliced from {base}: {widths_of(slices.to_dict())}",
        text_widths(slices.width, slices.widths),
        table(None, "layer", "width", "cut", "influence", rows=rows),
    ]


def _adapter(model: str, revision: str | None) -> tuple[str, Any, dict[str, Any]] | None:
    """The kind of an adapter, the map of the base that it belongs to, and the size of its file; None for a model.

    Raises:
        ValueError: If the adapter has no kept-layer map, or a damaged one.
    """
    from transformers.utils import cached_file  # type: ignore[attr-defined]  # re-exported there

    from ..layer_map import ADAPTER_MAP, LayerMap
    from ..publish.folder import describe_adapter
    from ..utils import json_at

    def file(name: str) -> Path | None:
        found = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    settings = None if file("config.json") else file("adapter_config.json")
    if settings is None:
        return None
    layers = file(ADAPTER_MAP)
    if layers is None:
        base = json_at(settings, "base_model_name_or_path")
        raise ValueError(
            f"Expected an adapter with {ADAPTER_MAP}, got {model}, which was not made on a model that trimllm_hf trimmed. "
            f"Inspect its base, {base}."
        )
    weights = file("adapter_model.safetensors")
    if weights is None:
        raise ValueError(f"Expected adapter_model.safetensors in {model}, got none.")
    return f"{json_at(settings, 'peft_type')} adapter", LayerMap.from_dict(json_at(layers)), describe_adapter(weights)


def _what_if(model: str, config: Any, picture: Path | None, as_json: bool) -> None:
    from ..latency.depths import depths
    from ..utils import format_bytes, quantizer_of

    found, equal = depths(config)
    if picture is not None:
        from ..publish.pictures import refuse_no_matplotlib, save, what_if_figure

        refuse_no_matplotlib()
        refuse_unwritable(picture.parent)
        picture.parent.mkdir(parents=True, exist_ok=True)
        save(what_if_figure(found), picture)
    plain = {"model": model, "equal_blocks": equal, "depths": [asdict(depth) for depth in found]}

    def show() -> list[RenderableType]:
        rows = [
            (
                d.num_layers,
                f"{d.parameters:,}",
                format_bytes(d.weight_bytes),
                "-" if d.kv_cache_bytes_per_token is None else format_bytes(d.kv_cache_bytes_per_token),
                "-" if d.byte_bound is None else f"{d.byte_bound:.2f}",
            )
            for d in found
        ]
        heads = ("layers", "parameters", "weights", "cache per token", "bytes a token, full depth / this one")
        notes = [] if equal else ["The blocks differ in size: a depth is given for blocks of average size."]
        if quantizer := quantizer_of(config):
            notes.append(f"Its weights are quantized ({quantizer}); the sizes are those of the same model unquantized.")
        return [table(model, *heads, rows=rows), *notes]

    answer(plain, as_json, show)


def _shown(plain: dict[str, Any], layer_map: Any) -> list[RenderableType]:
    from ..publish.figures import dropped, history_rows
    from ..utils import format_bytes

    held = plain["weights"]
    base = layer_map.base_model or "a base that is not named"
    if plain["trimmed"]:
        base += f"@{layer_map.base_revision}" if layer_map.base_revision else ""
        what = (
            f"keeps {layer_map.num_layers} of the {layer_map.base_num_layers} layers of {base}; gone: {dropped(layer_map)}"
        )
    else:
        what = f"{layer_map.num_layers} layers, none dropped"
    dtypes = ", ".join(held["parameters_by_dtype"])
    shown: list[RenderableType] = [
        f"{plain['model']} ({plain['model_type']}): {what}",
        plain["strip"],
        f"{held['parameters']:,} parameters in {len(held['files'])} file(s), {format_bytes(held['bytes'])} ({dtypes})",
    ]
    shown += [f"{each['reader']}: {each['verdict']} ({each['reason']})" for each in plain["readers"]]
    if layer_map.history:
        heads = ("step", "dropped", "by", "score")
        shown.append(table("Drops, in the base's numbering", *heads, rows=history_rows(layer_map)))
    return shown
