"""A config of its own for a model that shares one: transformers' models keep the config object that they are made from."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")


def unshare_config(model: nn.Module) -> None:
    """Where another model holds one of this model's configs, give this model, and what wraps it, copies.

    A config that only this model holds stays the same object.
    """
    held = {id(module.config): module.config for module in model.modules() if _has_config(module)}
    mine = {id(vars(module)) for module in model.modules()}
    # modules keep their attributes in a dict, which is what refers to the config
    holders = [dict_ for dict_ in gc.get_referrers(*held.values()) if isinstance(dict_, dict) and "_modules" in dict_]
    wrappers = [holder for holder in holders if id(holder) not in mine and model in _modules_below(holder)]
    others = [holder for holder in holders if id(holder) not in mine and not any(holder is each for each in wrappers)]
    if not others:
        return
    logger.info(f"This {type(model).__name__} shares its config with another model: it gets one of its own.")
    copies: dict[int, Any] = {}
    for config in held.values():
        copy.deepcopy(config, copies)
    for holder in [vars(module) for module in model.modules()] + wrappers:
        if id(holder.get("config")) in held:
            holder["config"] = copies[id(holder["config"])]


def _has_config(module: nn.Module) -> bool:
    return isinstance(vars(module).get("config"), PreTrainedConfig)


def _modules_below(attributes: dict[str, Any]) -> Iterator[nn.Module]:
    for child in attributes["_modules"].values():
        if child is not None:
            yield from child.modules()
