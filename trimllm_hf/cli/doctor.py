"""`trimllm doctor`: checks before a long run whether a model can be trimmed, under which engine, and what a scan costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from .app import Json, answer, app, table

_OTHER = {"decoder": "encoder", "encoder": "decoder"}
COPIES = 4  # of the weights that AdamW trains with: the weights, their gradients and two moments


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    engine: Annotated[str, typer.Option(help="Engine of the planned run: none, ddp, fsdp2, zero1, zero2, zero3.")] = "none",
    part: Annotated[str | None, typer.Option(help="Of an encoder-decoder: decoder (the default) or encoder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code stored beside the weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say whether a model can be trimmed: which layers can go, how far, who can read the result, and what it costs.

    Exit status 1 if it cannot be trimmed here; the reason is printed. Only config.json is loaded. Under FSDP2 and ZeRO-3 the
    memory is divided among the processes.

    **Example:** `trimllm doctor org/base --engine zero3`
    """
    from ..engines.requirements import ENGINES, PACKAGES

    if engine not in ENGINES:
        raise typer.BadParameter(f"Expected one of {', '.join(ENGINES)}, got {engine}.", param_hint="--engine")
    from transformers import AutoConfig

    from ..latency.depths import with_random_weights
    from ..latency.sizes import sizes_of
    from ..surgery.blocks import find_blocks
    from ..surgery.feasibility import feasible_drops
    from ..utils import quantizer_of

    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    with _without_warnings():
        made = with_random_weights(config, device="meta")
        found, sizes = feasible_drops(made, part), sizes_of(made)
    packages = {name: _version(name) for name in PACKAGES}
    missing = [name for name in ENGINES[engine] if packages[name] is None]
    old = _too_old()
    layers = found.num_layers
    half = [depth for depth in found.depths if depth >= layers / 2]
    plain: dict[str, Any] = {
        "model": model,
        "model_type": config.model_type,
        "built_as": type(made).__name__,
        "architectures": config.architectures,
        "part": find_blocks(made, part).part,
        "quantizer": quantizer_of(config),
        "num_layers": layers,
        "parameters": sizes.parameters,
        "weight_bytes": sizes.weight_bytes,
        "can_be_dropped_alone": list(found.alone),
        "refused": {str(position): why for position, why in found.refusals.items()},
        "depths": list(found.depths),
        "keep_the_pattern_alone": list(found.portable),
        "readers": _readers(config, found.portable != found.alone),
        "sublayers": found.sublayers is None,
        "why_no_sublayers": found.sublayers,
        "engine": engine,
        "missing_for_engine": missing,
        "too_old": old,
        "packages": packages,
        "packages_are": PACKAGES,
        "scan_in_forward_passes": {"one": layers / 2, "half_depth": _passes(layers, layers // 2)},
        "training_bytes": {str(depth): COPIES * _bytes(made, part, depth) for depth in [layers, *half[-1:]]},
    }
    answer(plain, as_json, lambda: _shown(plain))
    if not found.depths or missing or old:
        raise typer.Exit(1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what transformers logs when it builds a model, which here happens once for each layer."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _passes(layers: int, target: int) -> float:
    """Forward passes of a calibration set that scans for each drop from a depth to another cost, in full-depth passes.

    One scan at depth n is n(n-1)/2 block calls in the sweep, and the pass that it starts from; a pass is n block calls.
    """
    return sum((n * (n - 1) / 2 + n) / layers for n in range(target + 1, layers + 1))


def _bytes(model: Any, part: str | None, depth: int) -> int:
    """Bytes of the weights of a depth, where a block that goes weighs what blocks do in the mean."""
    from ..surgery.blocks import find_blocks

    blocks = find_blocks(model, part).blocks
    of_blocks = sum(tensor.nbytes for tensor in [*blocks.parameters(), *blocks.buffers()])
    of_all = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return int(of_all - of_blocks * (len(blocks) - depth) / len(blocks))


def _readers(config: Any, has_pattern: bool) -> list[dict[str, str]]:
    """For each other reader, after which drops it reads the model rightly; see `readers_of`."""
    from ..loading.readers import READERS, RIGHT, TRANSFORMERS_5, UNTRIED, readers_of

    by_list = {TRANSFORMERS_5, *(reader.name for reader in READERS if config.model_type in reader.by_list)}
    told = []
    for each in readers_of(config):
        if each.verdict != RIGHT:  # of the model as it is
            said = each.reason if each.verdict == UNTRIED else f"not even the base: {each.reason}"
        elif each.reader in by_list or not has_pattern:
            said = "whichever layers go"
        else:
            said = "where the kinds of the layers keep their pattern (portable=True)"
        told.append({"reader": each.reader, "drops": said})
    return told


def _too_old() -> list[str]:
    """What is installed in a version lower than this package requires."""
    if _version("trimllm_hf") is None:  # it lies on the path, and is not installed
        return []
    wanted = [Requirement(text) for text in requires("trimllm_hf") or []]
    return [
        f"{each.name} {found} (needs {each.specifier})"
        for each in wanted
        if (each.marker is None or each.marker.evaluate({"extra": ""}))
        and (found := _version(each.name)) is not None
        and not each.specifier.contains(found, prereleases=True)
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _shown(plain: dict[str, Any]) -> list[Any]:
    from ..utils import format_bytes

    layers, depths = plain["num_layers"], plain["depths"]
    alone, refused = plain["can_be_dropped_alone"], plain["refused"]
    part = f" {plain['part']}" if plain["part"] else ""
    if not depths:
        verdict = "cannot be trimmed by blocks"
    else:
        verdict = f"can be trimmed, from {layers}{part} layers down to {min(depths)}"
    lines = [f"{plain['model']} ({plain['model_type']}, {plain['parameters']:,} parameters): {verdict}."]
    if not plain["architectures"]:
        lines.append(f"Its config.json names no architecture; taken for {plain['built_as']}.")
    if plain["part"]:
        lines.append(f"This is about the {plain['part']}; --part {_OTHER[plain['part']]} is about the other one.")
    if plain["quantizer"]:
        lines.append(
            f"Its weights are quantized ({plain['quantizer']}): in general only adapters can be trained on them. Sizes "
            "here are those of the same model unquantized."
        )
    if refused and alone:
        lines.append(f"Cannot be dropped alone: {', '.join(refused)}.")
    lines += [f"Why: {next(iter(refused.values())).removesuffix(' Nothing was changed.')}"] if refused else []
    steps = {first - second for first, second in zip([layers, *depths], depths, strict=False)}
    if depths and steps != {1}:
        lines.append(f"Depths that can be reached: {', '.join(map(str, depths))}. Layers go {max(steps)} at a time at most.")
    if depths:
        lines += [
            "Who reads the result as it is:",
            *(f"  {each['reader']}: {each['drops']}" for each in plain["readers"]),
        ]
    why = plain["why_no_sublayers"]
    lines.append("By sublayers: yes." if why is None else f"By sublayers: no. {why}")
    cost = plain["scan_in_forward_passes"]
    lines.append(
        f"A scan of all layers costs {cost['one']:.3g} forward passes of the calibration set; one for each drop down to "
        f"half the depth {cost['half_depth']:.3g}. Block influence costs one pass each time. A scan takes half of the free "
        "memory, or scan_memory_gb; a drop less than a training step, in time and memory."
    )
    held = [f"{format_bytes(size)} with {depth} layers" for depth, size in plain["training_bytes"].items()]
    lines.append(f"Weights, gradients and AdamW's moments, without activations: {', '.join(held)}.")
    lines += [f"Too old here: {each}." for each in plain["too_old"]]
    if plain["missing_for_engine"]:
        lines.append(f"Missing for {plain['engine']}: {', '.join(plain['missing_for_engine'])}.")
    rows = [(name, found or "not installed", plain["packages_are"][name]) for name, found in plain["packages"].items()]
    return [*lines, table(None, "package", "version", "", rows=rows)]
