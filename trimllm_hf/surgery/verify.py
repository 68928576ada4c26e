"""Verification: checks that a model's trimmed config describes exactly the kept layers.

Two models are built on the meta device, which takes no memory: the one that the config describes now, and the one that the
trimmed config would describe. They are compared block by block. The comparison finds the attributes that number a layer and
must be renumbered, without a table of names. A drop that would change anything else is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any, NoReturn

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel

from ..layer_map import num_hidden_layers
from .blocks import BlockStack
from .forward_reads import forward_computes_with, forward_reads
from .from_config import build_from_config
from .per_layer_tensors import is_per_layer, per_layer_dimensions
from .trimmable import TrimmableModel

Scalar = int | float | bool | str | None
Changes = dict[tuple[str, str], tuple[Any, Any]]  # (module, attribute) -> (value now, value after)


@dataclass(frozen=True)
class Renumbering:
    """The other changes when layers are dropped.

    Attributes:
        attributes: The attributes of modules that number or count layers.
        configs: The fields of modules' configs: some modules hold their own config, derived from the model's.
        per_layer: The dimension along which a parameter holds a slice for each layer, by the parameter's name.
    """

    attributes: Changes
    configs: Changes
    per_layer: dict[tuple[str, str], int] = field(default_factory=dict)


def verify_drop(
    target: TrimmableModel, kept: Sequence[int], values: dict[str, Any], adapters: Mapping[str, Any]
) -> Renumbering:
    """Compare the model that the config describes with the one that the trimmed config would describe.

    Args:
        target: The model to trim.
        kept: Positions of the kept blocks.
        values: The config's fields that change, with their new values.
        adapters: The configs of the adapters after the drop, by name.

    Returns:
        The attributes and config fields that number or count layers, each with its value now and after.

    Raises:
        ValueError: If anything else would differ between a kept layer and the one that would be loaded for it.
    """
    model, stack, full = target.model, target.stack, target.skeleton
    try:
        trimmed = build_from_config(model, values, stack.part, adapters)
    except Exception as error:  # errors for a config that cannot be built differ between architectures
        raise ValueError(
            f"Expected {type(model).__name__} to be built from its trimmed config, got {type(error).__name__}: {error}. "
            "Its config has no field for removing these layers: drop others. Nothing was changed."
        ) from error
    inner_name = target.skeleton_stack.name
    attributes: Changes = {}
    configs: Changes = {}
    per_layer: dict[tuple[str, str], int] = {}
    seen: set[int] = set()
    for name, (of_full, of_trimmed) in _pairs(full, trimmed, inner_name, kept).items():
        block = _block_number(name, inner_name)
        if of_full is None or of_trimmed is None or not _same_kind(of_full, of_trimmed):
            _refuse(model, name, "another kind of module", _kind(of_full), _kind(of_trimmed))
        cuts = {} if block is not None else per_layer_dimensions(name, of_full, of_trimmed, len(stack), len(kept))
        per_layer |= {(name, parameter): dimension for parameter, dimension in cuts.items()}
        shapes = [_shapes(module, cuts) for module in (of_full, of_trimmed)]
        if shapes[0] != shapes[1]:
            _refuse(model, name, "other parameters", *_different(*shapes))
        real_name = name.replace(inner_name, stack.name, 1) if block is not None else name
        configs |= {(real_name, key): change for key, change in _config_changes(of_full, of_trimmed, seen).items()}
        before, after = _scalars(of_full), _scalars(of_trimmed)
        for attribute in sorted(before.keys() | after.keys()):
            old, new = before.get(attribute), after.get(attribute)
            if old == new or (isinstance(old, float) and isinstance(new, float) and isclose(old, new, rel_tol=1e-12)):
                continue
            if cuts and isinstance(old, int) and isinstance(new, int) and is_per_layer(old, new, len(stack), len(kept)):
                pass  # the size of a tensor that is cut
            elif block is None and isinstance(new, list) and values.get(attribute) == new:
                pass  # a copy of the config's own list, such as a backbone's stages
            elif isinstance(old, bool) or not _is_place(attribute, old, new, block, kept, len(stack), of_full):
                _refuse(model, f"{name}.{attribute}" if name else attribute, "another value", old, new)
            attributes[(real_name, attribute)] = (old, new)
    attributes |= _numbers_in_exchanged(stack, target.skeleton_stack.blocks, kept)
    _keep_room_in_the_cache(model, full, trimmed, stack.part)
    return Renumbering(attributes, configs, per_layer)


def _keep_room_in_the_cache(model: PreTrainedModel, full: nn.Module, trimmed: nn.Module, part: str | None) -> None:
    """Check T5: its decoder's keys and values are in a cache for which `generate` uses the depth of the *encoder*."""
    if part != "encoder" or not model.can_generate():
        return
    depth = num_hidden_layers(model.config, "decoder")
    configs: list[Any] = [full.config, trimmed.config]
    before, after = (getattr(c.get_text_config(decoder=True), "num_hidden_layers", depth) for c in configs)
    if after < depth <= before:
        raise ValueError(
            f"Expected at least {depth} encoder layers to stay in {type(model).__name__}, as many as its decoder has, got "
            f"{after}: transformers makes its decoder's cache as long as its encoder is deep, so it could not generate. "
            "Drop layers of the decoder (part='decoder') instead. Nothing was changed."
        )


def _is_place(
    attribute: str, old: Any, new: Any, block: int | None, kept: Sequence[int], depth: int, module: nn.Module
) -> bool:
    """Whether an attribute describes layer positions and changes in line with them."""
    if isinstance(old, list):
        one_per_layer = len(old) == depth and new == [old[position] for position in kept]
        # the first hidden state is the embedding
        one_per_layer |= len(old) == depth + 1 and new == [old[0], *(old[position + 1] for position in kept)]
        return one_per_layer or (bool(_INDICES.fullmatch(attribute)) and new == [kept.index(i) for i in old if i in kept])
    if block is not None and isinstance(old, str):  # some adapters store the name of their module
        return isinstance(new, str) and new.split(".") == [
            str(block) if word == str(kept[block]) else word for word in old.split(".")
        ]
    if attribute.endswith("tied_weights_keys"):  # transformers' own tables, keyed by layer names
        return True
    if isinstance(old, dict):  # Zamba 2: the number of a layer -> its number among the layers with attention
        stay = [layer for layer in old if layer in kept]
        return new == {kept.index(layer): number for number, layer in enumerate(stay)}
    if block is not None and (old, new) == (kept[block], block):
        return not forward_computes_with(module, attribute, old, new)
    if isinstance(old, int) and isinstance(new, int) and _NUMBER.fullmatch(attribute):
        two_a_block = block is not None and old - new == 2 * (kept[block] - block)  # LongCat has two attentions a block
        return (new == bisect_left(kept, old) or two_a_block) and not forward_computes_with(module, attribute, old, new)
    return (old, new) == (depth, len(kept)) and (block is None or not forward_reads(module, attribute))


_INDICES = re.compile(r".*layer.*")
_NUMBER = re.compile(r".*layer.*(idx|index|id|number)")


def _numbers_in_exchanged(stack: BlockStack, built: nn.ModuleList, kept: Sequence[int]) -> Changes:
    """Layer numbers in modules other than those the config builds: BigBird exchanges its attention for short inputs."""
    found: Changes = {}
    for new, old in enumerate(kept):
        as_built = {path: type(module) for path, module in built[old].named_modules()}
        for path, module in stack.blocks[old].named_modules(prefix=f"{stack.name}.{new}"):
            if type(module) is not as_built.get(path.removeprefix(f"{stack.name}.{new}").removeprefix(".")):
                numbers = [name for name, value in vars(module).items() if _NUMBER.fullmatch(name) and value == old]
                found |= {(path, name): (old, new) for name in numbers}
    return found


def _pairs(
    full: nn.Module, trimmed: nn.Module, stack_name: str, kept: Sequence[int]
) -> dict[str, tuple[nn.Module | None, nn.Module | None]]:
    """Pairs of modules that must match, by their name in the trimmed model."""
    position = {str(old): str(new) for new, old in enumerate(kept)}
    prefix = f"{stack_name}."
    by_name: dict[str, nn.Module] = {}
    for name, module in full.named_modules():
        if name.startswith(prefix):
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if number not in position:
                continue  # dropped
            name = f"{prefix}{position[number]}{dot}{rest}"
        by_name[name] = module
    other = dict(trimmed.named_modules())
    return {name: (by_name.get(name), other.get(name)) for name in sorted(by_name.keys() | other.keys())}


def _block_number(name: str, stack_name: str) -> int | None:
    prefix = f"{stack_name}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def _shapes(module: nn.Module, per_layer: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors if name not in per_layer}


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Two dicts without their common entries."""
    return [{k: v for k, v in a.items() if k not in b or b[k] != v} for a, b in ((one, other), (other, one))]


def _scalars(module: nn.Module) -> dict[str, Any]:
    """A module's own plain attributes: numbers, texts, flags, lists of them, and functions by their names."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, Scalar):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, Scalar) for item in value):
            found[name] = list(value)
        elif isinstance(value, dict) and all(isinstance(item, Scalar) for item in (*value, *value.values())):
            found[name] = dict(value)
        elif callable(value) and hasattr(value, "__qualname__"):
            found[name] = value.__qualname__
    return found


def _config_changes(of_full: nn.Module, of_trimmed: nn.Module, seen: set[int]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two modules' configs differ; reported once for a config that many modules share."""
    before, after = getattr(of_full, "config", None), getattr(of_trimmed, "config", None)
    if not isinstance(before, PreTrainedConfig) or not isinstance(after, PreTrainedConfig) or id(before) in seen:
        return {}
    seen.add(id(before))
    return {
        key: (old, vars(after)[key])
        for key, old in vars(before).items()
        if not key.startswith("_") and not isinstance(old, PreTrainedConfig) and vars(after).get(key, old) != old
    }


def _same_kind(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of the same class; torch gives each parametrized module a class of its own."""
    if is_parametrized(one) and is_parametrized(other):
        return type(one).__bases__ == type(other).__bases__
    return type(one) is type(other)


def _kind(module: nn.Module | None) -> str:
    return "none" if module is None else type(module).__name__


def _refuse(model: nn.Module, where: str, what: str, old: object, new: object) -> NoReturn:
    raise ValueError(
        f"Expected the layers that stay in {type(model).__name__} to be the same under the trimmed config, got {what} "
        f"at {where or 'the model'}: {old} now, {new} after. Drop other layers; this architecture ties that to a "
        "layer's place. Nothing was changed."
    )
