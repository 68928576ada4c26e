"""Finds a model's stack of blocks, without a table of model names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .layer_map import num_hidden_layers


@dataclass(frozen=True)
class Stack:
    """A model's blocks and the config that describes them.

    Attributes:
        name: Dotted path of the `ModuleList` in the model, e.g. "model.layers".
        blocks: The `ModuleList` itself.
        config: The config that holds the depth: the model's own, or its text part.
    """

    name: str
    blocks: nn.ModuleList
    config: PreTrainedConfig

    def __len__(self) -> int:
        return len(self.blocks)


def find_stack(model: nn.Module) -> Stack:
    """The stack of blocks that a model's `num_hidden_layers` counts.

    It is the `ModuleList` of that length whose items are `GradientCheckpointingLayer`s or are named in the model's
    `_no_split_modules`: the two marks by which transformers itself knows a block.

    Raises:
        ValueError: If the model is no transformers model, or has no such list, or more than one.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"Expected a transformers model (with a config), got {type(model).__name__}. Unwrap it first, or use "
            "drop_prepared_layers for a model that an Accelerator has prepared."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"Expected a model with one stack of blocks, got the encoder-decoder {type(model).__name__}, which cannot "
            "be trimmed yet."
        )
    depth = num_hidden_layers(config)
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(isinstance(b, GradientCheckpointingLayer) or type(b).__name__ in no_split for b in module)
    ]
    if len(found) != 1:
        lists = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ValueError(
            f"Expected one list of {depth} blocks in {type(model).__name__} (its config's depth), got "
            f"{[name for name, _ in found] or 'none'} among the module lists {lists}. This architecture cannot be "
            "trimmed, or its config does not describe it."
        )
    name, blocks = found[0]
    return Stack(name, blocks, config.get_text_config(decoder=True))
