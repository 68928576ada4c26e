"""Saves the adapters of a trimmed model with its kept-layer map, and with a stop tensor for deeper bases.

PEFT matches an adapter to modules by name, so an adapter trained on a trimmed model would be loaded into the first layers of
the full one. Its folder therefore gets the kept-layer map, and its weights get an empty tensor, the stop tensor. It is named
after a parameter of the first layer, or of the first sublayer, that the trimmed model does not have: PEFT ignores it on the
trimmed base, and on another base raises a size mismatch error, with or without this package.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..layer_map import ADAPTER_MAP, LayerMap
from .adapters import adapters_of, base_of, names_layers
from .blocks import find_blocks

_PREFIX = "base_model.model."  # PEFT's prefix of each name in an adapter's file
_WEIGHTS = "adapter_model.safetensors"  # peft.utils.SAFETENSORS_WEIGHTS_NAME
_PICKLED = "adapter_model.bin"  # peft.utils.WEIGHTS_NAME
_STOP = torch.empty(0, 0, 0)  # no weight has this shape, and it cannot be copied into one


def patch_adapter_save(base: nn.Module, stack: str, layer_map: LayerMap, adapters: Mapping[str, Any] | None = None) -> None:
    """Make the adapters of a model save its kept-layer map and the stop tensor beside their configs.

    PEFT saves an adapter's config last, with the config's own method.

    Args:
        base: The transformers model.
        stack: The name of its list of blocks.
        layer_map: Its map.
        adapters: The configs of the adapters, by name; by default those inside the model.
    """
    if not layer_map.dropped_layers and layer_map.has_all_sublayers:
        return
    library = getattr(type(base), "stock_class", type(base)).__module__
    layers = f"{_PREFIX}{stack}."
    blocks = list(base.get_submodule(stack).children())
    names = [{name for name, _ in block.named_parameters()} for block in blocks]
    in_all = sorted(set.intersection(*names) or set.union(*names))  # adapters may be in only some layers
    for adapter, config in (adapters_of(base) if adapters is None else adapters).items():
        of_base = next((name for name in in_all if f".{adapter}." not in name), in_all[0])
        missing = next((_of_sublayer(number, blocks, names, adapter) for number, _ in layer_map.missing_sublayers), None)
        config.save_pretrained = partial(_save_with_map, config, library, layers, of_base, missing, layer_map)


def patch_all(model: nn.Module) -> None:
    """Patch all adapters of a trimmed model, including those added after the drop; see `patch_adapter_save`."""
    peft = sys.modules.get("peft")
    base = base_of(model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model)
    adapters: Any = getattr(model, "peft_config", None)
    if getattr(getattr(base, "config", None), "trim", None) is not None:
        stack = find_blocks(base)
        patch_adapter_save(base, stack.name, LayerMap.from_config(base.config, stack.part), adapters)
    elif hasattr(type(base), "stock_class"):
        for config in adapters.values():
            config.save_pretrained = partial(_save_with_stock_class, config, type(base).stock_class.__module__)


def without_stop(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors without the stop tensor, for a model of the right depth.

    Raises:
        ValueError: If the model is deeper.
    """
    kept = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            kept[name] = tensor
            continue
        module, _, attribute = name.rpartition(".")
        try:
            holds = model.get_submodule(module)
            found = hasattr(holds, attribute) or isinstance(holds, nn.ModuleDict)  # by adapter, where the name has none
        except AttributeError:
            found = False
        if found:
            raise ValueError(
                f"Expected an adapter of a model with the layers of this one, got one that was trained without {name!r}: "
                "its base was trimmed. Call trim_like(model, folder) on the full-depth base before it gets an adapter. "
                "Nothing was changed."
            )
    return kept


def _of_sublayer(number: int, blocks: Sequence[nn.Module], names: Sequence[set[str]], adapter: str) -> str | None:
    """A parameter of a sublayer that a block lacks, by its name in other blocks; the adapter's parameter if it has one."""
    empty = {name for name, child in blocks[number].named_children() if not any(True for _ in child.parameters())}
    gone = sorted(name for name in set.union(*names) if name.partition(".")[0] in empty)
    own = [name.replace(f".{adapter}.", ".") for name in gone if f".{adapter}." in name]
    return f"{number}.{(own or gone)[0]}" if gone else None


def _save_with_stock_class(config: Any, library: str, save_directory: str, **kwargs: Any) -> None:
    """Save a config that names the architecture's own class, which PEFT imports and which builds the custom class."""
    if mapping := kwargs.get("auto_mapping_dict"):
        kwargs["auto_mapping_dict"] = {**mapping, "parent_library": library}
    type(config).save_pretrained(config, save_directory, **kwargs)


def _save_with_map(
    config: Any,
    library: str,
    layers: str,
    of_base: str,
    missing: str | None,
    layer_map: LayerMap,
    save_directory: str,
    **kwargs: Any,
) -> None:
    _save_with_stock_class(config, library, save_directory, **kwargs)
    folder = Path(save_directory)
    (folder / ADAPTER_MAP).write_text(json.dumps(layer_map.to_dict(), indent=2) + "\n", encoding="utf-8")
    weights = folder / _WEIGHTS
    if weights.is_file():
        with safe_open(weights, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata()
        _add_stop(tensors, config, layers, of_base, missing, layer_map)
        save_file(tensors, f"{weights}.unfinished", metadata=metadata)
        os.replace(f"{weights}.unfinished", weights)
    elif (weights := folder / _PICKLED).is_file():
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        _add_stop(tensors, config, layers, of_base, missing, layer_map)
        torch.save(tensors, f"{weights}.unfinished")
        os.replace(f"{weights}.unfinished", weights)


def _add_stop(
    tensors: dict[str, torch.Tensor], config: Any, layers: str, of_base: str, missing: str | None, layer_map: LayerMap
) -> None:
    of_layers = [name.removeprefix(layers).partition(".")[2] for name in sorted(tensors) if name.startswith(layers)]
    # if all layers have the same names, use the name of an adapter's own tensor, which other readers expect
    rest = of_layers[0] if of_layers and not names_layers(config, "target_parameters") else of_base
    tensors[f"{layers}{missing or f'{layer_map.num_layers}.{rest}'}"] = torch.empty(
        0, 0, 0
    )  # no weight has this shape, and it cannot be copied into one
