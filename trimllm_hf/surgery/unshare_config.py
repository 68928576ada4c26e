"""Gives a model its own config if it shares one: transformers models keep the config object they are built from."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")


def unshare_config(model: nn.Module) -> None:
    """Give a model, and what wraps it, copies of the configs that another model holds as well.

    A config that only this model holds remains the same object.
    """
    own = list(model.modules())
    held = {id(config): config for config in map(_config_of, own) if config is not None}
    ids = set(map(id, own))
    # checks every live module instead of the referrers of the config, which Python does not report in the same way in all
    # versions
    holders = [module for module in _living_modules() if id(_config_of(module)) in held and id(module) not in ids]
    wrappers = [holder for holder in holders if any(module is model for module in holder.modules())]
    if len(wrappers) == len(holders):
        return
    logger.info(f"This {type(model).__name__} shares its config with another model: it gets one of its own.")
    give_own_config(model, wrappers)


def give_own_config(model: nn.Module, wrappers: Sequence[nn.Module] = ()) -> None:
    """Give a model, and what wraps it, copies of the configs that the model's modules hold."""
    modules = list(model.modules())
    held = {id(config): config for config in map(_config_of, modules) if config is not None}
    copies: dict[int, Any] = {}
    for config in held.values():
        copy.deepcopy(config, copies)
    for module in [*modules, *wrappers]:
        if id(own_config := _config_of(module)) in held:
            vars(module)["config"] = copies[id(own_config)]


def _living_modules() -> Iterator[nn.Module]:
    # checks the type itself: for some lazy proxies, isinstance would load the object
    return (found for found in gc.get_objects() if issubclass(type(found), nn.Module) and "_modules" in vars(found))


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else None
