"""`TrimmableModel`: the model, blocks, layer map and adapters that a drop needs, looked up once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layer_map import LayerMap
from .adapters import adapters_of, base_of
from .blocks import BlockStack, find_blocks
from .from_config import build_from_config
from .sublayers import PassThrough


@dataclass(frozen=True)
class TrimmableModel:
    """A model in its current state, with everything needed to plan drops. It is outdated after a drop.

    Attributes:
        model: The unwrapped model, without PEFT's wrapper.
        stack: Its blocks, and the config that describes them.
        layer_map: The layers that it keeps of its base.
        adapters: The configs of its adapters, by name.
        outer: The model as it was passed, with PEFT's wrapper if it has one.
    """

    model: PreTrainedModel
    stack: BlockStack
    layer_map: LayerMap
    adapters: Mapping[str, Any]
    outer: nn.Module

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model that the config describes, with all sublayers and the adapters, on the meta device."""
        return build_from_config(self.model, {}, self.stack.part, self.adapters)

    @cached_property
    def skeleton_stack(self) -> BlockStack:
        """The blocks of `skeleton`."""
        return find_blocks(self.skeleton, self.stack.part)


def resolve_model(model: nn.Module, part: str | None = None) -> TrimmableModel:
    """Look up a model's blocks, layer map and adapters; nothing is changed.

    Args:
        model: A transformers model, or one with adapters, that no engine has wrapped.
        part: For an encoder-decoder, "decoder" or "encoder"; by default the one that was trimmed, else the decoder.

    Raises:
        ValueError: If the model has no single list of blocks, or `config.trim` does not fit it.
    """
    base: PreTrainedModel = base_of(model)
    stack = find_blocks(base, part)
    layer_map = LayerMap.from_config(base.config, part)
    if not layer_map.has_all_sublayers and not any(isinstance(each, PassThrough) for each in stack.blocks.modules()):
        raise ValueError(
            f"Expected a {type(base).__name__} that lacks what its config.trim says, got one with all sublayers: "
            "it was built from the config of another model that was trimmed. Give it a config of its own, or build it by an "
            "Auto class. Nothing was changed."
        )
    return TrimmableModel(base, stack, layer_map, adapters_of(base), model)
