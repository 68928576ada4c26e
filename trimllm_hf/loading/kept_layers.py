"""A trimmed model straight from the files of its base: the dropped layers are never read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import (  # type: ignore[attr-defined]  # its types re-export none of them
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    logging,
)

from ..layer_map import LayerMap
from ..surgery.blocks import find_blocks
from ..surgery.drop import plan_drop
from ..surgery.older_spellings import add_to
from ..surgery.per_layer_tensors import cut

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_COPIED = ("generation_config.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class _Plan:
    """What to read. `names` says for each file which of its tensors are kept, and their names in the trimmed model."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    files: dict[str, Path]
    names: dict[str, dict[str, str]]
    packed: dict[str, int]  # by the name of a tensor that holds a part for each layer, along which dimension
    kept_layers: Sequence[int]
    depth: int


def load_kept_layers(
    base: str | Path,
    kept_layers: Sequence[int],
    auto_class: Any = None,
    part: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load only some layers of a base model; of its files nothing else is read.

    Args:
        base: Hub id or folder of the base model, in safetensors, in one file or many. Of a Hub model only the files that
            hold kept tensors are downloaded.
        kept_layers: The layers to keep, in the base's numbering.
        auto_class: The Auto class to load by, e.g. `AutoModelForSequenceClassification`; by default the class that the
            base's config names, else `AutoModelForCausalLM`.
        part: Of an encoder-decoder, whose layers `kept_layers` are: "decoder" (the default there) or "encoder".
        **from_pretrained_kwargs: As for `from_pretrained`: `dtype`, `device_map`, `quantization_config`, `revision`, …
            Pickled weights are read only with `use_safetensors=False`.

    Returns:
        The trimmed model, with its map in `config.trim`.

    Raises:
        ValueError: If a layer is out of range or repeated, the architecture cannot be trimmed so, or the base has no
            safetensors weights.
        OSError: If the base cannot be found.
    """
    plan = _plan(base, kept_layers, auto_class, part, from_pretrained_kwargs)
    arguments = {k: v for k, v in from_pretrained_kwargs.items() if k not in (*_HUB_ARGUMENTS, "use_safetensors")}
    state = dict(_kept_tensors(plan))
    model: PreTrainedModel = plan.model_class.from_pretrained(None, config=plan.config, state_dict=state, **arguments)
    if model.can_generate() and (generation := _find(base, "generation_config.json", from_pretrained_kwargs)):
        model.generation_config = transformers.GenerationConfig.from_pretrained(generation.parent)
    return model


def write_kept_layers(
    base: str | Path,
    kept_layers: Sequence[int],
    folder: str | Path,
    auto_class: Any = None,
    part: str | None = None,
    **hub_kwargs: Any,
) -> LayerMap:
    """Write a trimmed checkpoint from a base's files, one file at a time: memory holds one file's kept tensors.

    Tensors keep their bytes, and their names but for the layers' numbers. The tokenizer goes along.

    Args:
        base: As for `load_kept_layers`.
        kept_layers: The layers to keep, in the base's numbering.
        folder: Where to write; must be new or empty.
        auto_class: As for `load_kept_layers`.
        part: As for `load_kept_layers`.
        **hub_kwargs: `revision`, `token`, `cache_dir`, …

    Returns:
        The map, which also stands in the written config.json.

    Raises:
        ValueError: As `load_kept_layers`, or if the folder holds something. Nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected a new or empty folder to write to, got {str(folder)!r}. Name another, or empty it.")
    plan = _plan(base, kept_layers, auto_class, part, hub_kwargs)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = [file for file in plan.files if plan.names[file]]
    index: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        name = SAFE_WEIGHTS_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = dict(_kept_tensors(plan, [file]))
        save_file(tensors, unfinished / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(files) > 1:
        plain = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (unfinished / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    plan.config.save_pretrained(unfinished)
    if (described := _find(base, "config.json", hub_kwargs)) is not None:
        add_to(unfinished / "config.json", plan.config, json.loads(described.read_text(encoding="utf-8")))
    for name in _COPIED:
        if (found := _find(base, name, hub_kwargs)) is not None:
            shutil.copyfile(found, unfinished / name)
    try:
        transformers.AutoTokenizer.from_pretrained(base, **_hub(hub_kwargs)).save_pretrained(unfinished)
    except (OSError, ValueError, KeyError) as error:
        logging.get_logger("transformers.trimllm_hf").warning(f"No tokenizer was written: {base} has none ({error}).")
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return LayerMap.from_config(plan.config)


def _plan(
    base: str | Path, kept_layers: Sequence[int], auto_class: Any, part: str | None, arguments: dict[str, Any]
) -> _Plan:
    """Check everything on a model without memory, and find the tensors by the files' headers."""
    hub = _hub(arguments)
    trust = {name: arguments[name] for name in ("trust_remote_code",) if name in arguments}
    config = AutoConfig.from_pretrained(base, **hub, **trust)
    with torch.device("meta"):
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if auto_class is None and named is not None:
            model = named._from_config(config)
        else:
            model = (auto_class or AutoModelForCausalLM).from_config(config, **trust)
    found = _find(base, "config.json", arguments)
    model.config._commit_hash = extract_commit_hash(None if found is None else str(found), None)  # for the map
    stack = find_blocks(model, part)
    depth = len(stack)
    LayerMap(depth, tuple(kept_layers))  # raises on what is no list of layers
    if getattr(config, "trim", None) is not None and LayerMap.from_config(config).unit != "block":
        raise ValueError("Expected a base of whole blocks, got one trimmed by sublayers. Load it with from_pretrained.")
    _, names = _headers(base, arguments)
    prefix = _layer_prefix([name for held in names.values() for name in held], stack.name, depth)
    place = {old: new for new, old in enumerate(kept_layers)}
    renamed: dict[str, dict[str, str]] = {}
    for file, held in names.items():
        renamed[file] = {}
        for name in held:
            if not name.startswith(prefix):
                renamed[file][name] = name
                continue
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in place:
                renamed[file][name] = f"{prefix}{place[int(number)]}.{rest}"
    packed: dict[str, int] = {}
    dropped = [layer for layer in range(depth) if layer not in place]
    if dropped:
        drop = plan_drop(model, dropped, part=part)
        drop.apply()
        for (module, key), dimension in drop.renumbering.per_layer.items():
            ending = f"{module.rpartition('.')[2]}.{key}"
            packed |= {n: dimension for held in renamed.values() for n in held.values() if n.endswith(ending)}
    needed = {file: _download(base, file, arguments) for file in renamed if renamed[file]}
    return _Plan(type(model), model.config, needed, renamed, packed, kept_layers, depth)


def _kept_tensors(plan: _Plan, files: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """File by file: a kept tensor's name in the trimmed model, and the tensor as it is there."""
    for name, tensor in _tensors(plan, files):
        packed = name in plan.packed
        yield name, cut(tensor, plan.packed[name], plan.depth, plan.kept_layers) if packed else tensor


def _tensors(plan: _Plan, files: Sequence[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files if files is not None else plan.files:
        path = plan.files[file]
        if path.suffix != ".safetensors":
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            yield from ((new, held[old]) for old, new in plan.names[file].items())
            continue
        with path.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            for old, new in plan.names[file].items():
                start, end = header[old]["data_offsets"]
                tensor = torch.empty(header[old]["shape"], dtype=str_to_torch_dtype[header[old]["dtype"]])
                _read_into(tensor, opened, 8 + size + start, end - start)
                yield new, tensor


def _read_into(tensor: torch.Tensor, file: io.RawIOBase, offset: int, size: int) -> None:
    """Fill a tensor from a file: not by a mapping of it, through which the kernel reads the neighbours as well.

    Raises:
        ValueError: If the file ends too soon, or its header contradicts itself.
    """
    bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(bytes_of) if tensor.numel() else memoryview(b"")
    file.seek(offset)
    done = 0
    while done < len(view) and (read := file.readinto(view[done:])):
        done += read
    if done != size or size != len(view):
        raise ValueError(f"Expected {len(view)} bytes of a tensor, got {done} at {offset}. The base's file is damaged.")


def _headers(base: str | Path, arguments: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The weight files of a base and the tensors that each holds."""
    pickled = arguments.get("use_safetensors") is False
    one, many = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if pickled else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if (index := _find(base, many, arguments)) is not None:
        held: dict[str, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            held.setdefault(file, []).append(name)
        return list(held), held
    if (path := _find(base, one, arguments)) is not None:
        try:
            if pickled:
                return [one], {one: list(torch.load(path, map_location="meta", mmap=True, weights_only=True))}
            with safe_open(path, framework="pt") as opened:
                return [one], {one: list(opened.keys())}
        except SafetensorError as error:
            raise ValueError(f"Expected safetensors weights in {path}, got: {error}. The file is damaged.") from None
    advice = ""
    if not pickled and any(_find(base, name, arguments) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        advice = " It has pickled weights, which can run code: use_safetensors=False reads them, as in from_pretrained."
    raise ValueError(f"Expected {one} or {many} in {str(base)!r}, got neither.{advice}")


def _layer_prefix(names: Sequence[str], stack_name: str, depth: int) -> str:
    """What stands before a layer's number in a checkpoint's names: in some files another prefix than in the model."""
    last = stack_name.rpartition(".")[2]
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(rf"(?:^|\.){re.escape(last)}\.(\d+)\.", name):
            numbers.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    whole = [prefix for prefix, found in numbers.items() if found == set(range(depth))]
    exact = [prefix for prefix in whole if f"{stack_name}.".endswith(prefix) or prefix.endswith(f"{stack_name}.")]
    if len(exact or whole) != 1:
        raise ValueError(
            f"Expected tensors of the layers 0 to {depth - 1} under one name like {stack_name!r} in the base's files, got "
            f"{sorted(exact or whole) or sorted(numbers)[:5]}. Load the whole model and use drop_layers."
        )
    return (exact or whole)[0]


def _hub(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def _find(base: str | Path, name: str, arguments: dict[str, Any]) -> Path | None:
    """A file of the base, or None where it has none of that name."""
    found = cached_file(
        base,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_hub(arguments),
    )
    return None if found is None else Path(found)


def _download(base: str | Path, name: str, arguments: dict[str, Any]) -> Path:
    found = cached_file(base, name, **_hub(arguments))
    assert found is not None  # it raises on a missing file
    return Path(found)
