"""Parameters that an engine has cut into shards: their whole shape, and what a process holds of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """A parameter's shape as if it were whole: ZeRO-3 leaves an empty tensor, and the shape in an attribute."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 holds a parameter: each process has a part of it, and its gradient is the mean over the processes."""
    return isinstance(parameter, DTensor)


def local_product(parameter: nn.Parameter, world_size: int) -> torch.Tensor:
    """Sum |w * dL/dw| over what this process holds of a parameter, divided by how many processes hold the same.

    Added up over the processes it is the sum over the whole parameter. A float64 scalar on the CPU.

    Args:
        parameter: With a gradient.
        world_size: Number of processes.
    """
    weight: torch.Tensor = parameter
    gradient, copies = parameter.grad, world_size
    assert gradient is not None
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        copies = 1
        for dimension, placement in enumerate(parameter.placements):
            copies *= parameter.device_mesh.size(dimension) if placement.is_replicate() else 1
        weight, gradient = parameter.to_local(), gradient.to_local()
    return (weight.float() * gradient.float()).abs().sum().double().cpu() / copies


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed has cut into shards when it was made: there is nothing whole to copy.

    Raises:
        ValueError: Saying how to make it whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "Expected a whole model for distill_weight, got one that DeepSpeed ZeRO-3 made in shards. Make the model before "
            "the TrainingArguments: then it is whole, and cut into shards when training begins."
        )
