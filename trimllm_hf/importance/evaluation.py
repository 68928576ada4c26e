"""How a model is run to be scored; everything afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..layer_map import LayerMap
from ..utils import evaluating


@contextmanager
def to_be_scored(model: nn.Module, part: str | None) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled code, plain outputs; the part of an encoder-decoder is named in its map.

    Raises:
        ValueError: If the model has no such part.
    """
    # a stance is in force once it is made, not once it is entered: so it is made in the with statement
    with torch.compiler.set_stance("force_eager"), evaluating([model]), _of_part(model, part), _plain_outputs(model):
        with torch.no_grad():
            yield


@contextmanager
def _of_part(model: nn.Module, part: str | None) -> Iterator[None]:
    """Name the part in the model's map, from which every score takes it; without a map, in one for the time being."""
    config: Any = model.config
    missing = part is not None and getattr(config, "trim", None) is None
    layer_map = LayerMap.from_config(config, part)  # raises where the part does not fit
    if missing:
        config.trim = layer_map.to_dict()
    try:
        yield
    finally:
        if missing:
            del config.trim


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """No cache, which would mix the candidates, and no loss for balancing experts, which says nothing of the answer."""
    names = ("use_cache", "output_router_logits", "_output_attentions", "output_hidden_states")
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if isinstance(config, PreTrainedConfig)]
    configs += [config.get_text_config(decoder=True) for config in configs]
    unique = {id(config): config for config in configs}.values()
    had = [(config, name, vars(config)[name]) for config in unique for name in names if name in vars(config)]
    try:
        for config, name, _ in had:
            vars(config)[name] = False
        yield
    finally:
        for config, name, value in had:
            vars(config)[name] = value
