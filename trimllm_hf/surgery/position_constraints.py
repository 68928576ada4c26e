"""Layers with special treatment in a model's `forward`, which leaves no trace in the modules for verification to find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .blocks import BlockStack


def check_position_constraints(
    model: PreTrainedModel, stack: BlockStack, kept: Sequence[int], has_all_sublayers: bool = True
) -> None:
    """Refuse a drop that would move a special treatment in the model's `forward` to another layer.

    Args:
        model: The model to trim.
        stack: Its blocks.
        kept: Positions of the kept blocks.
        has_all_sublayers: Whether all of them keep their attention and their MLP.

    Raises:
        ValueError: Naming the layers that must be kept.
    """
    owner = model.get_submodule(stack.name.rpartition(".")[0])
    if hasattr(owner, "layers_are_rescaled"):  # RWKV
        _keep_scales(model, stack, len(kept) < len(stack), has_all_sublayers)
    for why, layers in _tied(model, owner, stack, kept):
        if gone := sorted(set(layers) - set(kept)):
            raise ValueError(
                f"Expected the layers {sorted(layers)} of {type(model).__name__} to stay, got {gone} to drop: {why}. Drop "
                "other layers. Nothing was changed."
            )


def _keep_scales(model: PreTrainedModel, stack: BlockStack, fewer: bool, has_all_sublayers: bool) -> None:
    every = stack.config.rescale_every
    if not has_all_sublayers:
        raise ValueError(
            f"Expected an attention and an MLP that return nothing but hidden states, got those of {type(model).__name__}, "
            "which return their state too. Use unit='block'. Nothing was changed."
        )
    if fewer and 0 < every < len(stack):
        raise ValueError(
            f"Expected rescale_every=0 in the config of {type(model).__name__}, got {every}: in evaluation the "
            "weights of each layer are scaled by its number. Set it before the model first runs in evaluation. Nothing was "
            "changed."
        )


def _tied(
    model: PreTrainedModel, owner: nn.Module, stack: BlockStack, kept: Sequence[int]
) -> Iterator[tuple[str, Sequence[int]]]:
    if isinstance(getattr(owner, "conv", None), nn.Module):  # DeBERTa v2
        yield "a convolution follows the first", [0]
    yield "all later ones read their outputs", _marked(stack, "is_block_boundary")  # Inkling 2
    if set(_marked(stack, "is_kv_shared_layer")) & set(kept):  # Gemma 3n and 4
        yield "later ones read their keys and values", _marked(stack, "store_full_length_kv")
    if stack.config is not model.config:
        fed = max((_fed(config) for config in _configs(model.config)), default=0)
        yield "features of an image are added at them by their number", list(range(min(fed, len(stack))))


def _marked(stack: BlockStack, flag: str) -> list[int]:
    """The blocks that have a flag set, on themselves or on a module inside."""
    return [i for i, block in enumerate(stack.blocks) if any(getattr(each, flag, False) for each in block.modules())]


def _fed(config: PreTrainedConfig) -> int:
    """How many of the first text layers receive features from the vision part (Qwen 3 VL: "deepstack")."""
    of_vision = getattr(config, "deepstack_visual_indexes", None) or ()
    pairs: Any = getattr(config, "deepstack_layer_map", None) or ()  # Granite 4: (vision layer, text layer)
    return max(len(of_vision), *(layer + 1 for _, layer in pairs), 0)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)
