"""`trimllm score`: how important each layer of a model is on a file of examples, without training."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, answer, app, refuse_unwritable, table


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[Path, typer.Option(help="Examples: JSON Lines or CSV (text; or prompt, completion), or plain text.")],
    importance: Annotated[
        list[str] | None, typer.Option(help="A score; can be repeated. Default: sensitivity, block_influence.")
    ] = None,
    unit: Annotated[str, typer.Option(help="block, or sublayer (attention and MLP separately).")] = "block",
    size: Annotated[int, typer.Option(help="Number of examples, from the start of the file.")] = 64,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of an example.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 4,
    per_ms: Annotated[
        bool, typer.Option("--per-ms", help="Divide the rise of the loss by the ms that the layer takes.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(help="With --per-ms: tokens before the timed ones.")] = 128,
    memory_gb: Annotated[float | None, typer.Option(help="Memory for a scan, in GB, on top of a forward pass.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the accelerator by default.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, …; auto: as in the files.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for scores.json and, with matplotlib, scores.png and what_if.png.")
    ] = Path("runs/score"),
    as_json: Json = False,
) -> None:
    """Print how important each layer is on your data, the least important first; draw it, and the size at other depths.

    Higher = more important. `sensitivity` is the loss per token without the layer. Nothing is trained or dropped. With
    `--per-ms` it is the rise of the loss for each millisecond per generated token that the layer takes, measured on this
    machine; if all blocks are alike, the order does not change.

    **Example:** `trimllm score org/base --data train.jsonl --importance sensitivity`
    """
    for option, value in (("--size", size), ("--batch-size", batch_size), ("--max-length", max_length - 1)):
        if value < 1:
            raise typer.BadParameter("Expected a number that leaves something to score.", param_hint=option)
    from ..importance import needs_data, refuse_not_per_ms
    from .examples import make_batches, read_examples

    names = importance or ["sensitivity", "block_influence"]
    for name in names:
        needs_data(name)  # raises on an unknown one, before anything is loaded
    if per_ms:
        refuse_not_per_ms(*names)
    examples = read_examples(data, size)
    refuse_unwritable(out)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..importance import score_layers, standard_error
    from ..latency.layer_times import measure_layers

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=_dtype(dtype))
    loaded.to(device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"))
    batches = make_batches(AutoTokenizer.from_pretrained(model, revision=revision), examples, max_length, batch_size)
    ms = measure_layers(loaded, unit, prompt_tokens=prompt_tokens) if per_ms else None
    how: dict[str, Any] = {"memory_gb": memory_gb, "progress": not as_json, "unit_ms": ms}
    scores, spread = {}, {}
    for name in names:
        told = f"{name} per ms" if per_ms else name
        of_batches: list[torch.Tensor] = []
        scores[told] = score_layers(loaded, batches, name, unit, of_batches=of_batches, **how).tolist()
        if (found := standard_error(of_batches)) is not None:
            spread[told] = found.tolist()
    plain = {
        "model": model,
        "unit": unit,
        "layers": _names(loaded, unit),
        "ms": ms,
        "scores": scores,
        "standard_errors": spread,
        "margins": {name: _margin(values) for name, values in scores.items()},
        "data": str(data),
        "examples": sum(len(batch["input_ids"]) for batch in batches),
        "scored_tokens": sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    drawn = find_spec("matplotlib") is not None
    if drawn:
        _draw(plain, loaded.config, out)
    answer(plain, as_json, lambda: _shown(plain, out, drawn))


def _dtype(name: str) -> Any:
    import torch

    found = "auto" if name == "auto" else getattr(torch, name, None)
    if found != "auto" and not isinstance(found, torch.dtype):
        raise ValueError(f"Expected a dtype like bfloat16 or float32, or auto, got {name!r}.")
    return found


def _names(model: Any, unit: str) -> list[str]:
    """The layers by the base's numbering, in the order of their scores."""
    from ..layer_map import LayerMap

    layer_map = LayerMap.from_config(model.config)
    if unit == "block":
        return [str(layer) for layer in layer_map.kept_layers]
    return [f"{kind} {layer}" for layer, kind in layer_map.sublayers]


def _margin(values: list[float]) -> float | None:
    """The difference between the two lowest scores."""
    lowest = sorted(values)
    return lowest[1] - lowest[0] if len(lowest) > 1 else None


def _shown(plain: dict[str, Any], out: Path, drawn: bool) -> list[Any]:
    names, scores = list(plain["scores"]), plain["scores"]
    order = sorted(range(len(plain["layers"])), key=lambda i: scores[names[0]][i])
    columns = {name: _figures(scores[name], plain["standard_errors"].get(name)) for name in names}
    if plain["ms"]:
        columns["ms"] = [f"{value:.3f}" for value in plain["ms"]]
    rows = [(plain["layers"][i], *(column[i] for column in columns.values())) for i in order]
    margins = [f"{name} {value:.4g}" for name, value in plain["margins"].items() if value is not None]
    files = "scores.json, scores.png and what_if.png" if drawn else "scores.json (no pictures: matplotlib is not installed)"
    return [
        table(f"{plain['model']}: layers, the least important by {names[0]} first", "layer", *columns, rows=rows),
        f"On {plain['examples']} examples, {plain['scored_tokens']:,} tokens. From the least important to the next: "
        f"{', '.join(margins) or '-'}."
        + (" ±: the standard error over the batches, without what all layers share." if plain["standard_errors"] else ""),
        f"In {out}: {files}.",
    ]


def _figures(values: list[float], errors: list[float] | None) -> list[str]:
    if errors is None:
        return [f"{value:.4f}" for value in values]
    return [f"{value:.4f} ± {error:.4f}" for value, error in zip(values, errors, strict=True)]


def _draw(plain: dict[str, Any], config: Any, out: Path) -> None:
    """The scores, the least important layer of each marked; and what the model would weigh at each depth."""
    from ..latency.depths import depths
    from ..publish.pictures import importance_figure, save, what_if_figure

    scores = plain["scores"]
    least = {name: [values.index(min(values))] for name, values in scores.items()}
    figure = importance_figure(plain["layers"], scores, plain["standard_errors"], least, "red: the least important")
    save(figure, out / "scores.png")
    save(what_if_figure(depths(config)[0]), out / "what_if.png")
