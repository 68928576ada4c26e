"""Adapters (PEFT): seen through, renumbered with the layers that stay, and saved with the map of what stays.

PEFT matches an adapter to modules by their names, so one that was trained on a trimmed model would be put on the first
layers of the full one. Its folder therefore gets the kept-layer map, and its weights a tensor without elements, by the
name of a parameter of the first layer, or the first half of one, that the trimmed model does not have: PEFT passes over it
on the trimmed base, and on another one raises an error of sizes that do not match, with or without this package.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..layer_map import ADAPTER_MAP, LayerMap

_PREFIX = "base_model.model."  # PEFT's, before each name in an adapter's file
_WEIGHTS = "adapter_model.safetensors"  # peft.utils.SAFETENSORS_WEIGHTS_NAME
_NUMBERED = re.compile(r"\d")


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, a compiled model, or a module that wraps exactly one; others as they are.

    A module that wraps one is a Sentence-Transformers model, or one of the user's own around an encoder.

    Raises:
        ValueError: If the adapter is of a kind that cannot lose layers: prompts and prefixes, or several kinds mixed; or if
            a module wraps several transformers models.
    """
    if is_compiled_module(model):
        model = model._orig_mod  # type: ignore[assignment]  # a module, for all that torch's types say
    peft = sys.modules.get("peft")  # not imported: nothing can be of its classes
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return _inner_model(model)
    if isinstance(model, peft.PeftMixedModel) or any(c.is_prompt_learning for c in model.peft_config.values()):
        kinds = [config.peft_type.value for config in model.peft_config.values()]
        raise ValueError(
            f"Expected an adapter inside the layers, like LoRA, got {kinds} in a {type(model).__name__}. Prompts and mixed "
            "adapters cannot follow when layers are dropped. Use LoRA."
        )
    return base_of(model.get_base_model())


def _inner_model(model: nn.Module) -> nn.Module:
    """The one transformers model in a module that is none itself; the module where it holds none, or an engine wraps it."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module) or "module" in model._modules:
        return model
    found = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) > 1:
        raise ValueError(
            f"Expected one transformers model inside {type(model).__name__}, got {len(outer)}: {outer}. Give the one whose "
            f"layers are meant, e.g. model.{outer[0]}."
        )
    return found[outer[0]] if outer else model


def adapters_of(base: nn.Module) -> dict[str, Any]:
    """The configs of the adapters in a transformers model, by name."""
    return dict(getattr(base, "peft_config", None) or {})


def inject(model: nn.Module, adapters: Mapping[str, Any]) -> nn.Module:
    """Put adapters without weights into a model on the meta device.

    Raises:
        ValueError: If PEFT cannot put an adapter of this kind into a model layer by layer.
    """
    if not adapters:
        return model
    import peft

    for name, config in adapters.items():
        config = _copied(config)
        if getattr(config, "layer_replication", None):
            raise ValueError(
                "Expected adapters on the model's own layers, got layer_replication in the LoRA config, which shares them. "
                "Layers cannot be dropped then: leave it out."
            )
        for field in ("init_lora_weights", "init_weights"):  # some begin with a decomposition of the weights
            if hasattr(config, field):
                setattr(config, field, False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peft.inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
            except ValueError as error:
                raise ValueError(
                    f"Expected an adapter that is made layer by layer, like LoRA, got {config.peft_type.value}: {error} "
                    "Layers cannot be dropped with it: use LoRA."
                ) from error
    return model


def candidate_adapter_configs(
    adapters: Mapping[str, Any], full: nn.Module, stack: str, kept: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What the adapters' configs may have to be when only the layers `kept` stay; the likeliest first.

    The same, where no field names a layer by its number. Else numbers are renumbered, and patterns with numbers in them
    are replaced by the names of the modules that they mean.

    Args:
        adapters: The configs, by name. They are not changed.
        full: The model with all layers and its adapters.
        stack: The name of its list of blocks.
        kept: Positions of the layers that stay, ascending.
    """
    yield {name: _copied(config) for name, config in adapters.items()}
    if adapters:
        renumbered = {name: _copied(config) for name, config in adapters.items()}
        for name, config in renumbered.items():
            vars(config).update(_renumbered(name, config, full, stack, kept))
        yield renumbered


def patch_adapter_save(base: nn.Module, stack: str, layer_map: LayerMap) -> None:
    """Make the adapters of a model save its kept-layer map, and the stop for deeper bases, beside their configs.

    PEFT saves an adapter's config last, by the config's own method.
    """
    if not layer_map.dropped_layers and layer_map.has_all_sublayers:
        return
    layers = f"{_PREFIX}{stack}."
    blocks = list(base.get_submodule(stack).children())
    names = [{name for name, _ in block.named_parameters()} for block in blocks]
    in_all = sorted(set.intersection(*names) or set.union(*names))  # adapters may be in some layers only
    for adapter, config in adapters_of(base).items():
        of_base = next((name for name in in_all if f".{adapter}." not in name), in_all[0])
        of_kind = next((_of_half(number, blocks, names, adapter) for number, _ in layer_map.missing_sublayers), None)
        config.save_pretrained = partial(_save_with_map, config, layers, of_base, of_kind, layer_map)


def _of_half(number: int, blocks: Sequence[nn.Module], names: Sequence[set[str]], adapter: str) -> str | None:
    """A parameter of the sublayer that a block lacks, by its name in the others; the adapter's own if it has one there."""
    empty = {name for name, child in blocks[number].named_children() if not any(True for _ in child.parameters())}
    gone = sorted(name for name in set.union(*names) if name.partition(".")[0] in empty)
    own = [name.replace(f".{adapter}.", ".") for name in gone if f".{adapter}." in name]
    return f"{number}.{(own or gone)[0]}" if gone else None


def _save_with_map(
    config: Any,
    layers: str,
    of_base: str,
    of_kind: str | None,
    layer_map: LayerMap,
    save_directory: str,
    **kwargs: Any,
) -> None:
    type(config).save_pretrained(config, save_directory, **kwargs)
    folder = Path(save_directory)
    (folder / ADAPTER_MAP).write_text(json.dumps(layer_map.to_dict(), indent=2) + "\n", encoding="utf-8")
    weights = folder / _WEIGHTS
    if not weights.is_file():
        return
    with safe_open(weights, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        metadata = opened.metadata()
    of_layers = [name.removeprefix(layers).partition(".")[2] for name in sorted(tensors) if name.startswith(layers)]
    # where every layer has the same, the name of an adapter's own tensor will do, which other readers expect
    rest = of_layers[0] if of_layers and not _names_layers(config) else of_base
    tensors[f"{layers}{of_kind or f'{layer_map.num_layers}.{rest}'}"] = torch.empty(0)
    save_file(tensors, f"{weights}.unfinished", metadata=metadata)
    os.replace(f"{weights}.unfinished", weights)


def _names_layers(config: Any) -> bool:
    """Whether a config's choice of modules may depend on a layer's number."""
    if getattr(config, "layers_to_transform", None) is not None:
        return True
    chosen = [getattr(config, field, None) or () for field in ("target_modules", "exclude_modules")]
    texts = [text for value in chosen for text in ([value] if isinstance(value, str) else value)]
    return any(_NUMBERED.search(text) for text in texts)


def _renumbered(adapter: str, config: Any, full: nn.Module, stack: str, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a config that name layers by their numbers, for the layers that stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix, place = f"{stack}.", {str(old): str(new) for new, old in enumerate(kept)}
    layers: dict[str, Any] = {}
    for name, module in full.named_modules():
        if not isinstance(module, BaseTunerLayer) or adapter not in getattr(module, "r", {adapter: 0}):
            continue
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            layers[name] = module
        elif number in place:
            layers[f"{prefix}{place[number]}{dot}{rest}"] = module
    values: dict[str, Any] = {}
    chosen = getattr(config, "layers_to_transform", None)
    if chosen is not None:
        chosen = [chosen] if isinstance(chosen, int) else chosen
        values["layers_to_transform"] = [new for new, old in enumerate(kept) if old in chosen]
        if not values["layers_to_transform"]:
            raise ValueError(
                f"Expected the adapter {adapter!r} to stay on a layer, got a drop of all that it is on ({chosen}). Drop "
                "other layers. Nothing was changed."
            )
    elif _names_layers(config):
        values |= {"target_modules": set(layers), "exclude_modules": None}
    alpha = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    for field, attribute in (("rank_pattern", "r"), ("alpha_pattern", alpha)):
        if any(_NUMBERED.search(pattern) for pattern in getattr(config, field, None) or ()):
            usual = getattr(config, attribute)
            by_name = {name: getattr(module, attribute)[adapter] for name, module in layers.items()}
            values[field] = {name: value for name, value in by_name.items() if value != usual}
    return values


def _copied(config: Any) -> Any:
    """A copy of an adapter's config, without the mark."""
    copied = copy.copy(config)
    vars(copied).pop("save_pretrained", None)
    return copy.deepcopy(copied)
