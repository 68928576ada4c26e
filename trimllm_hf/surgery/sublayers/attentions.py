"""The attentions that cannot be dropped: the cache takes its length from the first attention of each layer type."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import cache_utils

from ...layer_map import LayerMap
from ..blocks import BlockStack

WITH_STATE = {"linear_attention", "conv", "recurrent", "mamba"}  # instead of keys and values
WITHOUT_CACHE = {"moe", "mlp"}  # layers of a hybrid that have no attention


def keeps_keys_and_values(layer_type: str) -> bool:
    """Whether layers of a type have keys and values in the cache, from transformers' own table if it has one."""
    kind = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {}).get(layer_type)
    if kind is not None:
        return issubclass(kind, cache_utils.CacheLayerMixin)
    return layer_type not in WITH_STATE | WITHOUT_CACHE


def layer_types(stack: BlockStack) -> list[str]:
    """The type of each block in the config, e.g. "full_attention" or "sliding_attention"; "attention" if it has none."""
    types = getattr(stack.config, "layer_types", None) or getattr(stack.config, "layers_block_type", None)
    return list(types) if isinstance(types, list | tuple) and len(types) == len(stack) else ["attention"] * len(stack)


def attentions_that_stay(stack: BlockStack, layers: Sequence[int], positions: Sequence[int]) -> list[int]:
    """The layers among `layers` whose attention cannot be dropped.

    These are the first of each layer type; for types with a state instead of keys and values, the last.

    Args:
        stack: The model's blocks.
        layers: The layers, in any numbering.
        positions: Their positions in the model as it is now.
    """
    types = layer_types(stack)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for layer, position in zip(layers, positions, strict=True):
        if types[position] in WITHOUT_CACHE:
            continue
        first.setdefault(types[position], layer)
        last[types[position]] = layer
    return sorted({*first.values(), *(layer for kind, layer in last.items() if kind in WITH_STATE)})


def keep_attentions(stack: BlockStack, after: LayerMap, positions: Sequence[int]) -> None:
    """Refuse to drop an attention from which the cache takes its length.

    Args:
        stack: The model's blocks as they are now.
        after: The map after the drop.
        positions: The current position of each of its layers.

    Raises:
        ValueError: Naming the layers.
    """
    there = set(after.sublayers)
    missing = [
        layer for layer in attentions_that_stay(stack, after.kept_layers, positions) if (layer, "attention") not in there
    ]
    if missing:
        raise ValueError(
            f"Expected the attention of the base's layers {missing} to stay: the first of its type, from which the cache "
            "reads its length, so that the model could not generate without it. Drop other layers. Nothing was changed."
        )
