"""Builds the model that a config describes, as loading from config.json would, on the meta device by default."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..layer_map import num_hidden_layers, part_config
from .adapters import inject

WARNING = 30  # logging.WARNING


def build_from_config(
    model: PreTrainedModel,
    values: dict[str, Any],
    part: str | None = None,
    adapters: Mapping[str, Any] = MappingProxyType({}),
    device: str | torch.device = "meta",
) -> nn.Module:
    """The model and its adapters with `values` set in the config that holds the depth; weights are new, or not allocated."""
    config = copy.deepcopy(model.config)
    for name, value in values.items():
        setattr(part_config(config, part), name, value)
    # Through a dict and back, as loading from config.json would: derived values are computed again.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, WARNING))  # building a model logs its whole config at INFO
    try:
        attention = {"": model.config._attn_implementation}
        for name in config.sub_configs:
            attention[name] = getattr(getattr(config, name), "_attn_implementation", None)
        # classes that build a model without some sublayers refer to the architecture's own, which builds all
        config_class = getattr(type(config), "stock_class", type(config))
        config = config_class.from_dict(config.to_dict(), attn_implementation=attention)
        with torch.device(device):
            return inject(_construct(model, config), adapters)
    finally:
        logging.set_verbosity(verbosity)


def _construct(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config.

    For a class that needs more than a config, what can be built from one is built: its nearest base class, or the one model
    inside it that has the same config, under the same name.

    Raises:
        ValueError: If its `__init__` loads weights, or no part of it can be built.
    """
    kind: Any = getattr(type(model), "stock_class", type(model))
    _refuse_own_weights(kind)
    for base in kind.__mro__:
        if issubclass(base, PreTrainedModel) and base.forward is not nn.Module.forward and _takes_a_config(base):
            built: nn.Module = base(config)
            break
    else:
        built = _construct_inside(model, config)
    if not _takes_a_config(kind):
        _refuse_own_lists(model, built)
    return built


def _construct_inside(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    inside = {name: module for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)}
    outer = {
        name: module
        for name, module in inside.items()
        if module.config is model.config and not any(name.startswith(f"{other}.") for other in inside)
    }
    if len(outer) != 1:
        raise ValueError(
            f"Expected a class that is built from its config alone, or around one model of the same config, got "
            f"{type(model).__name__}, whose __init__ wants more, around {sorted(outer) or 'none'}. Give the inner model "
            "whose layers are meant. Nothing was changed."
        )
    ((name, core),) = outer.items()
    root: Any = nn.Module()
    root.config, root._no_split_modules = config, core._no_split_modules
    holder = root
    *above, last = name.split(".")
    for part in above:
        holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.add_module(last, _construct(core, config))
    built: nn.Module = root
    return built


def _takes_a_config(kind: type) -> bool:
    """Whether a class can be built from a config alone."""
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]  # of the class itself
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return len(required) <= 1


def _refuse_own_weights(kind: type) -> None:
    for base in kind.__mro__:
        if base.__module__.startswith(("transformers.", "torch.")) or "__init__" not in vars(base):
            continue
        try:
            source = inspect.getsource(vars(base)["__init__"])
        except (OSError, TypeError):
            continue
        if ".from_pretrained(" in source:
            raise ValueError(
                f"Expected a class that is built from its config, got {base.__name__}, whose __init__ loads weights "
                "(from_pretrained): its trimmed checkpoint would be loaded into one of full depth. Build its parts from the "
                "config (AutoModel.from_config(config)). Nothing was changed."
            )


def _refuse_own_lists(model: PreTrainedModel, built: nn.Module) -> None:
    """Refuse lists of the model's depth that only the user's class has, since they may hold one item per layer."""
    known = {name for name, _ in built.named_modules()}
    depth = num_hidden_layers(model.config)
    for name, module in model.named_modules():
        if (
            name not in known
            and isinstance(module, nn.ModuleList | nn.ParameterList | nn.ModuleDict)
            and len(module) == depth
        ):
            raise ValueError(
                f"Expected a class that is built from its config alone, got {type(model).__name__}, whose own {name!r} has "
                f"{depth} items, as many as there are layers. Make its other arguments fields of the config. Nothing was "
                "changed."
            )
