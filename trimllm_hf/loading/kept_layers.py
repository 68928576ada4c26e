"""Loads a trimmed model directly from the files of its base, without reading the dropped layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import extract_commit_hash  # type: ignore[attr-defined]  # re-exported there

from ..layer_map import LayerMap, num_layers_behind
from ..surgery.blocks import find_blocks
from ..surgery.drop import plan_drop
from ..surgery.per_layer_tensors import cut
from .base_files import FILE_ARGUMENTS, HUB_ARGUMENTS, BaseFiles, WeightFile


@dataclass(frozen=True)
class KeptLayers:
    """What is read from a base's files.

    Attributes:
        model_class: The class of the trimmed model.
        config: Its config.
        files: The weight files that hold any of its tensors, by name.
        names: For each file, the tensors that are kept, and their names in the trimmed model.
        per_layer: For each tensor that holds a slice per layer, by its name, the dimension of the layers.
        kept_layers: The layers that stay.
        depth: The number of layers of the base.
        prefix: The part of the names before a layer's number.
        generation: The fields of the base's generation config that name layers, adjusted to the trimmed model.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    files: dict[str, WeightFile]
    names: dict[str, dict[str, str]]
    per_layer: dict[str, int]
    kept_layers: Sequence[int]
    depth: int
    prefix: str
    generation: dict[str, Any]

    def tensors(self, files: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield, file by file, each kept tensor's name in the trimmed model and its value there."""
        for file in self.files if files is None else files:
            for name, tensor in self.files[file].read(self.names[file]):
                dimension = self.per_layer.get(name)
                yield name, tensor if dimension is None else cut(tensor, dimension, self.depth, self.kept_layers)


def load_kept_layers(
    base: str | Path,
    kept_layers: Sequence[int],
    auto_class: Any = None,
    part: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load only some layers of a base model; nothing else is read from its files.

    Args:
        base: Hub id or folder of the base model, in safetensors, in one or more files. From the Hub, only the files that
            hold kept tensors are downloaded. Weight files are chosen in transformers' order of preference.
        kept_layers: The layers to keep, in the base's numbering.
        auto_class: The Auto class to load with, e.g. `AutoModelForSequenceClassification`; by default the class that the
            base's config names, else `AutoModelForCausalLM`.
        part: For an encoder-decoder, the stack that `kept_layers` refers to: "decoder" (the default there) or "encoder".
        **from_pretrained_kwargs: As for `from_pretrained`: `dtype`, `device_map`, `quantization_config`, `revision`,
            `variant`, `trust_remote_code`, … Pickled weights are read only with `use_safetensors=False`.

    Returns:
        The trimmed model, with its map in `config.trim`.

    Raises:
        ValueError: If a layer is out of range or repeated, the architecture cannot be trimmed in this way, the base has no
            safetensors weights, or an argument would choose other files.
        OSError: If the base cannot be found.
    """
    files = BaseFiles(base, from_pretrained_kwargs)
    plan = plan_kept_layers(files, kept_layers, auto_class, part)
    arguments = {k: v for k, v in from_pretrained_kwargs.items() if k not in (*HUB_ARGUMENTS, *FILE_ARGUMENTS)}
    state = dict(plan.tensors())
    model: PreTrainedModel = plan.model_class.from_pretrained(None, config=plan.config, state_dict=state, **arguments)
    if model.can_generate() and (generation := files.find("generation_config.json")):
        model.generation_config = transformers.GenerationConfig.from_pretrained(generation.parent, **plan.generation)
    return model


def plan_kept_layers(
    files: BaseFiles, kept_layers: Sequence[int], auto_class: Any = None, part: str | None = None, portable: bool = False
) -> KeptLayers:
    """Check everything on a model on the meta device, and locate the tensors by the files' headers.

    Raises:
        ValueError: As `load_kept_layers`.
    """
    files.refuse_arguments()
    config = AutoConfig.from_pretrained(files.base, **files.hub, **files.code)
    with torch.device("meta"):
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if auto_class is None and named is not None:
            model = named._from_config(config)
        else:
            model = (auto_class or AutoModelForCausalLM).from_config(config, **files.code)
    found = files.find("config.json")
    model.config._commit_hash = extract_commit_hash(None if found is None else str(found), None)  # for the map
    stack = find_blocks(model, part)
    depth = len(stack)
    LayerMap(depth, tuple(kept_layers))  # raises unless it is a valid list of layers
    if getattr(config, "trim", None) is not None and LayerMap.from_config(config).unit != "block":
        raise ValueError("Expected a base of whole blocks, got one trimmed by sublayers. Load it with from_pretrained.")
    weights = files.weights()
    behind = num_layers_behind(stack.config)
    prefix = _layer_prefix([name for file in weights.values() for name in file.tensors], stack.name, depth, behind)
    names = {file: renumbered(held.tensors, prefix, kept_layers) for file, held in weights.items()}
    per_layer: dict[str, int] = {}
    generation: dict[str, Any] = {}
    if file := files.find("generation_config.json"):  # it is kept even for a class that cannot generate
        model.generation_config = transformers.GenerationConfig.from_pretrained(file.parent)
    dropped = [layer for layer in range(depth) if layer not in set(kept_layers)]
    if dropped:
        drop = plan_drop(model, dropped, part=part, portable=portable)
        drop.apply()
        generation = {each.field: each.value for each in drop.references if each.path == ("generation_config",)}
        for (module, key), dimension in drop.renumbering.per_layer.items():
            ending = f"{module.rpartition('.')[2]}.{key}"
            per_layer |= {n: dimension for held in names.values() for n in held.values() if n.endswith(ending)}
    needed = {name: files.download(weights[name]) for name in weights if names[name]}
    return KeptLayers(type(model), model.config, needed, names, per_layer, kept_layers, depth, prefix, generation)


def renumbered(names: Iterable[str], prefix: str, kept_layers: Sequence[int]) -> dict[str, str]:
    """The names of the tensors that remain after a drop, each with its name in the trimmed model."""
    place: Mapping[str, int] = {str(old): new for new, old in enumerate(kept_layers)}
    found: dict[str, str] = {}
    for name in names:
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdecimal():
            found[name] = name
        elif number in place:
            found[name] = f"{prefix}{place[number]}{dot}{rest}"
    return found


def _layer_prefix(names: Sequence[str], stack_name: str, depth: int, behind: int) -> str:
    """The part of a checkpoint's names before a layer's number; in some files it differs from the model's.

    Layers for multi-token prediction, `behind` of them, may follow; transformers does not load them.
    """
    last = stack_name.rpartition(".")[2]
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(rf"(?:^|\.){re.escape(last)}\.(\d+)\.", name):
            numbers.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    whole = [prefix for prefix, found in numbers.items() if found - set(range(depth, depth + behind)) == set(range(depth))]
    exact = [prefix for prefix in whole if f"{stack_name}.".endswith(prefix) or prefix.endswith(f"{stack_name}.")]
    if len(exact or whole) != 1:
        raise ValueError(
            f"Expected tensors of the layers 0 to {depth - 1} under one name like {stack_name!r} in the base's files, got "
            f"{sorted(exact or whole) or sorted(numbers)[:5]}. Load the whole model and use drop_layers."
        )
    return (exact or whole)[0]
