"""The shape of a whole parameter, of which a process may hold only a shard."""

from __future__ import annotations

import torch


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """A tensor's shape before it was cut into shards.

    A DTensor (FSDP2) reports it by itself; a parameter that ZeRO-3 has partitioned is empty and keeps it as `ds_shape`.
    """
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))
