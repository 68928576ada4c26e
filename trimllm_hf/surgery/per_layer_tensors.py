"""Tensors outside the blocks that hold a slice for each block, and are cut when blocks are dropped.

Gemma 3n and 4 store the embeddings and the projection of each layer's own input in this way, in modules named
`..._per_layer...`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

WORD = "per_layer"


def per_layer_dimensions(name: str, of_full: nn.Module, of_trimmed: nn.Module, depth: int, num_kept: int) -> dict[str, int]:
    """The dimension along which a module's parameters hold a slice per layer, by parameter name; empty if there is none.

    Args:
        name: The module's name in the model.
        of_full: The module in the model with all layers.
        of_trimmed: The module in the trimmed model.
        depth: Number of layers.
        num_kept: Number of kept layers.
    """
    if WORD not in name.rpartition(".")[2]:
        return {}
    found: dict[str, int] = {}
    trimmed = dict(of_trimmed.named_parameters(recurse=False))
    for parameter, tensor in of_full.named_parameters(recurse=False):
        before, after = tensor.shape, trimmed[parameter].shape if parameter in trimmed else ()
        differ = [i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
        if (
            len(before) == len(after)
            and len(differ) == 1
            and is_per_layer(before[differ[0]], after[differ[0]], depth, num_kept)
        ):
            found[parameter] = differ[0]
    return found


def is_per_layer(before: int, after: int, depth: int, num_kept: int) -> bool:
    """Whether a size is the same multiple of the number of layers before and after a drop."""
    return before % depth == 0 and after == before // depth * num_kept


def cut(tensor: torch.Tensor, dimension: int, depth: int, kept: Sequence[int]) -> torch.Tensor:
    """A copy of a per-layer tensor with only the slices of the kept layers."""
    index = torch.tensor(kept, device=tensor.device)
    parts = tensor.unflatten(dimension, (depth, -1)).index_select(dimension, index)
    return parts.flatten(dimension, dimension + 1).contiguous()
