"""Builds the model that a config describes, as a load from config.json would, on the meta device by default."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..layer_map import part_config
from .adapters import inject

WARNING = 30  # logging.WARNING


def build_from_config(
    model: PreTrainedModel,
    values: dict[str, Any],
    part: str | None = None,
    adapters: Mapping[str, Any] = MappingProxyType({}),
    device: str | torch.device = "meta",
) -> nn.Module:
    """The model and its adapters once `values` are set where the config holds the depth; weights are new, or none."""
    config = copy.deepcopy(model.config)
    for name, value in values.items():
        setattr(part_config(config, part), name, value)
    # Through a dict and back, as a load from config.json would: derived values are derived again.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, WARNING))  # building a model tells its whole config at INFO
    try:
        attention = {"": model.config._attn_implementation}
        for name in config.sub_configs:
            attention[name] = getattr(getattr(config, name), "_attn_implementation", None)
        # classes that build a model without some sublayers have the architecture's own, which builds all
        config_class = getattr(type(config), "stock_class", type(config))
        config = config_class.from_dict(config.to_dict(), attn_implementation=attention)
        with torch.device(device):
            found: nn.Module = getattr(type(model), "stock_class", type(model))(config)
            return inject(found, adapters)
    finally:
        logging.set_verbosity(verbosity)
