"""Writes a trimmed checkpoint from a base's files: its weights, and the other files needed for loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..layer_map import LayerMap
from ..surgery.older_spellings import add_to
from ..utils import format_bytes
from .base_files import CODE_ARGUMENTS, FILE_ARGUMENTS, HUB_ARGUMENTS, BaseFiles
from .beside_weights import copy_beside_weights
from .kept_layers import KeptLayers, plan_kept_layers, renumbered
from .new_folder import new_folder
from .tokenizer_words import use_older_words

logger = logging.get_logger("transformers.trimllm_hf")


def write_kept_layers(
    base: str | Path,
    kept_layers: Sequence[int],
    folder: str | Path,
    auto_class: Any = None,
    part: str | None = None,
    portable: bool = False,
    **hub_kwargs: Any,
) -> LayerMap:
    """Write a trimmed checkpoint from a base's files, one file at a time: only one file's kept tensors are in memory.

    Tensors keep their bytes, and their names except for the layers' numbers. The base's other files are copied unchanged,
    including tokenizer, processors and licence. What is not copied (other weights, optimizer states, pickles, the base's
    card) is listed in the log.

    Args:
        base: As for `load_kept_layers`.
        kept_layers: The layers to keep, in the base's numbering.
        folder: Where to write: a new or empty folder; the current folder, a link or a mount point is allowed.
        auto_class: As for `load_kept_layers`.
        part: As for `load_kept_layers`.
        portable: Whether to refuse layers whose kinds some runtimes would derive wrongly from their numbers.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `variant`, `trust_remote_code`, …

    Returns:
        The map, which is also stored in the written config.json.

    Raises:
        ValueError: As `load_kept_layers`, or if the folder holds something, or an argument does not apply here. Nothing is
            written then.
        OSError: If the folder cannot be written, or has no space left. It is left as it was then.
    """
    known = (*HUB_ARGUMENTS, *FILE_ARGUMENTS, *CODE_ARGUMENTS)
    files = BaseFiles(base, hub_kwargs)
    files.refuse_arguments()
    if unknown := sorted(hub_kwargs.keys() - set(known)):
        raise ValueError(f"Expected arguments that say which files to read ({', '.join(known)}), got {', '.join(unknown)}.")
    with new_folder(Path(folder)) as unfinished:
        plan = plan_kept_layers(files, kept_layers, auto_class, part, portable)
        size = sum(file.nbytes(plan.names[name]) for name, file in plan.files.items())
        if (room := shutil.disk_usage(unfinished).free) < size:
            raise OSError(f"Expected {format_bytes(size)} of room for the weights in {folder}, got {format_bytes(room)}.")
        try:
            _write_weights(plan, unfinished)
        except SafetensorError as error:
            raise OSError(f"Expected to write {format_bytes(size)} of weights in {folder}, got: {error}.") from error
        plan.config.save_pretrained(unfinished)
        if (described := files.find("config.json")) is not None:
            add_to(unfinished / "config.json", plan.config, json.loads(described.read_text(encoding="utf-8")))
        left_out = copy_beside_weights(files, unfinished, hasattr(plan.config, "auto_map"))
        use_older_words(unfinished)
        if plan.generation:
            file = unfinished / "generation_config.json"
            text = json.dumps({**json.loads(file.read_text(encoding="utf-8")), **plan.generation}, indent=2) + "\n"
            file.write_text(text, encoding="utf-8")
    if left_out:
        logger.info(f"Not copied from {base}: {', '.join(left_out)}.")
    return LayerMap.from_config(plan.config)


def _write_weights(plan: KeptLayers, folder: Path) -> None:
    files = [file for file in plan.files if plan.names[file]]
    index: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        name = SAFE_WEIGHTS_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = dict(plan.tensors([file]))
        save_file(tensors, folder / name, metadata=_header_metadata(plan, file))
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(files) > 1:
        plain = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _header_metadata(plan: KeptLayers, file: str) -> dict[str, str]:
    """The metadata in a file's header, without the dropped layers; quantizers store there how each tensor is packed."""
    found = plan.files[file].header_metadata()
    names = renumbered(found, plan.prefix, plan.kept_layers)
    kept = {names[name]: text for name, text in found.items() if name in names}
    for name, text in kept.items():
        if plan.prefix in text:
            try:
                kept[name] = json.dumps(_renumbered_json(json.loads(text), plan))
            except ValueError:
                continue  # plain text, not names
    return {"format": "pt", **kept}


def _renumbered_json(value: Any, plan: KeptLayers) -> Any:
    """Lists and dicts that contain tensor names, adjusted to the kept layers."""
    if isinstance(value, str):
        return renumbered([value], plan.prefix, plan.kept_layers).get(value)
    if isinstance(value, list):
        found = [_renumbered_json(item, plan) for item in value]
        return [new for new, old in zip(found, value, strict=True) if new is not None or old is None]
    if isinstance(value, dict):
        names = renumbered(value, plan.prefix, plan.kept_layers)
        return {names[name]: _renumbered_json(item, plan) for name, item in value.items() if name in names}
    return value
