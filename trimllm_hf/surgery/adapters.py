"""Adapters (PEFT): access to the model inside, and renumbering for the kept layers."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from transformers import PreTrainedModel

from .layer_names import LayerNames

_NUMBERED = re.compile(r"\d")


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, a compiled model, or a module that wraps exactly one; else the model.

    A module that wraps one is, for example, a Sentence Transformers model, or a user-defined model around an encoder.

    Raises:
        ValueError: If the adapter does not support dropping layers (prompts, prefixes, several kinds mixed), or if a module
            wraps several transformers models.
    """
    if is_compiled_module(model):
        model = model._orig_mod  # type: ignore[assignment]  # torch's types do not say that it is a module
    if not _is_peft(model):
        return inner_model(model)
    outer: Any = model
    if isinstance(outer, sys.modules["peft"].PeftMixedModel) or any(map(_counts_layers, outer.peft_config.values())):
        kinds = [config.peft_type.value for config in outer.peft_config.values()]
        raise ValueError(
            f"Expected an adapter inside the layers, like LoRA, got {kinds} in a {type(model).__name__}. Prompts, in the "
            "last layers too, and mixed adapters cannot follow when layers are dropped. Use LoRA."
        )
    return base_of(outer.get_base_model())


def _counts_layers(config: Any) -> bool:
    """Whether an adapter applies to the model as a whole, or to a number of its last layers."""
    return bool(config.is_prompt_learning or config.is_adaption_prompt)


def _is_peft(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # if it is not imported, there are no instances of its classes
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def inner_model(model: nn.Module) -> nn.Module:
    """The single transformers model inside another module; the module itself if there is none, or an engine wraps it.

    A PeftModel is returned as it is: it is called like the model inside it.

    Raises:
        ValueError: If a module wraps several transformers models.
    """
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module) or "module" in model._modules:
        return model
    if _is_peft(model):
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
    """Add adapters without weights to a model on the meta device.

    Raises:
        ValueError: If PEFT cannot add an adapter of this kind to a model layer by layer.
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
        for field in ("init_lora_weights", "init_weights"):  # some start from a decomposition of the weights
            if hasattr(config, field):
                setattr(config, field, False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peft.inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
            except Exception as error:  # errors on the meta device differ between kinds of adapters
                raise ValueError(
                    f"Expected an adapter that is made layer by layer, like LoRA, got "
                    f"{config.peft_type.value}: {type(error).__name__}: {error}. Layers cannot be dropped with it: use "
                    "LoRA. Nothing was changed."
                ) from error
    return model


def candidate_adapter_configs(
    adapters: Mapping[str, Any], full: nn.Module, stack: str, kept: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Candidates for the adapters' configs when only the layers `kept` remain; the most likely first.

    Unchanged if no field names a layer by its number. Otherwise numbers are renumbered, and patterns that contain numbers
    are replaced by the names of the modules that they match.

    Args:
        adapters: The configs, by name. They are not changed.
        full: The model with all layers and its adapters.
        stack: The name of its list of blocks.
        kept: Positions of the kept layers, ascending.
    """
    if not adapters:
        yield {}
        return
    names = LayerNames(full, stack, kept)
    masked = {name: _copied(config) for name, config in adapters.items()}
    for config in masked.values():
        vars(config).update(_masks(config, names))
    yield masked
    renumbered = {name: _copied(config) for name, config in masked.items()}
    for name, config in renumbered.items():
        vars(config).update(_renumbered(name, config, full, stack, kept, names))
    yield renumbered


def renumber_statistics(model: nn.Module, names: LayerNames) -> None:
    """Renumber the statistics that AdaLoRA stores by the names of its matrices, in PEFT's wrapper of a model."""
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    for field in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        if isinstance(noted := getattr(allocator, field, None), dict):
            setattr(allocator, field, names.renumber(noted))


def names_layers(config: Any, *more: str) -> bool:
    """Whether a config's choice of modules, or of what more of its fields choose, may depend on a layer's number."""
    if getattr(config, "layers_to_transform", None) is not None:
        return True
    chosen = [getattr(config, field, None) or () for field in ("target_modules", "exclude_modules", *more)]
    texts = [text for value in chosen for text in ([value] if isinstance(value, str) else value)]
    return any(_NUMBERED.search(text) for text in texts)


def _masks(config: Any, names: LayerNames) -> dict[str, Any]:
    """AdaLoRA's rank masks, by the names of its matrices, for the kept layers; other adapters have none."""
    pattern = getattr(config, "rank_pattern", None)
    if not pattern or not all(isinstance(value, list) for value in pattern.values()):
        return {}
    return {"rank_pattern": names.renumber(pattern)}


def _renumbered(
    adapter: str, config: Any, full: nn.Module, stack: str, kept: Sequence[int], names: LayerNames
) -> dict[str, Any]:
    """The fields of a config that name layers by number, renumbered for the kept layers."""
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
    elif names_layers(config):
        values |= {"target_modules": set(layers), "exclude_modules": None}
    for field in ("modules_to_save", "target_parameters"):
        if getattr(config, field, None):
            values[field] = names.renumber(getattr(config, field))
    if _masks(config, names):
        return values
    alpha = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    for field, attribute in (("rank_pattern", "r"), ("alpha_pattern", alpha)):
        if any(_NUMBERED.search(pattern) for pattern in getattr(config, field, None) or ()):
            usual = getattr(config, attribute)
            by_name = {name: getattr(module, attribute)[adapter] for name, module in layers.items()}
            values[field] = {name: value for name, value in by_name.items() if value != usual}
    return values


def _copied(config: Any) -> Any:
    """A copy of an adapter's config without the patch marker."""
    copied = copy.copy(config)
    vars(copied).pop("save_pretrained", None)
    return copy.deepcopy(copied)
