"""Scores from gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..engines import ProcessGroup, is_sharded, local_product
from ..surgery.blocks import find_blocks
from ..surgery.units import Unit, list_units
from .calibration import Batch, model_inputs
from .finite import refuse_not_finite
from .metrics import num_label_tokens


def taylor(
    model: nn.Module, batches: Sequence[Batch], num_counted: int, unit: str, process_group: ProcessGroup
) -> torch.Tensor:
    """Sum |w * dL/dw| over a layer's weights, L the mean loss: Shortened LLaMA's Taylor (arXiv 2402.02834, §2.2).

    Here L is the loss per token on the calibration set. `TrimCallback` takes the gradient that training has just computed
    instead, where there is one: no pass at all. The parameters' own gradients are left as they were.

    Args:
        model: The model, in evaluation mode.
        batches: This process's batches, as many as on every other.
        num_counted: How many of them count; those behind are for the others' sake.
        unit: "block".
        process_group: The processes of the run.

    Raises:
        ValueError: If a batch has no labels, a score is not a number, or the engine keeps gradients to itself (ZeRO).
    """
    refuse_no_gradient(process_group)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = [num_label_tokens(model, batch) * (i < num_counted) for i, batch in enumerate(batches)]
    total = sum(process_group.gather(sum(tokens)))
    if not total:
        raise ValueError("Expected calibration batches with labels, got labels that are all -100.")
    layers = list(range(len(list_units(model, unit))))
    wrong: list[tuple[list[int], int]] = []
    had = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        for position, (batch, number) in enumerate(zip(batches, tokens, strict=True)):
            with torch.enable_grad():
                # sharded gradients come as the mean over the processes
                share = number / total * (process_group.world_size if any(map(is_sharded, parameters)) else 1)
                loss = model(**model_inputs(batch)).loss
                if number and not torch.isfinite(loss):
                    wrong.append((layers, position))
                (loss * share).backward()
        for parameter in parameters:
            if parameter.grad is not None and not is_sharded(parameter):
                process_group.sum_in_place(parameter.grad)
        scores = process_group.all_reduce(weights_times_gradients(model, unit, process_group.world_size))
        refuse_not_finite("taylor", scores, process_group.gather(wrong))
        return scores
    finally:
        for parameter, gradient in zip(parameters, had, strict=True):
            parameter.grad = gradient


def refuse_no_gradient(process_group: ProcessGroup) -> None:
    """Refuse an engine under which no gradient can be had beside training.

    Raises:
        ValueError: Saying what to use instead.
    """
    if not process_group.free_backward:
        raise ValueError(
            "Expected one process, DDP or FSDP2 for the importance 'taylor', got an engine that keeps "
            "gradients to itself. Use another importance, like 'sensitivity' or 'block_influence'."
        )


def refuse_frozen(model: nn.Module, unit: str) -> None:
    """Refuse layers with weights that do not train, which have no gradient: their share would be missing in the score.

    Raises:
        ValueError: Naming the layers.
    """
    blocks = find_blocks(model).blocks
    units = list_units(model, unit)
    frozen = [unit.position for unit in units if not all(p.requires_grad for p in _parameters(unit, blocks))]
    if frozen:
        raise ValueError(
            f"Expected all weights of the layers to train, to score them by gradients, got frozen ones in the layers "
            f"{frozen} (adapters, trainable_ratio). Use another importance, like 'sensitivity' or 'block_influence'."
        )


@torch.no_grad()
def weights_times_gradients(model: nn.Module, unit: str, world_size: int) -> torch.Tensor:
    """Sum |w * dL/dw| over each unit's weights, by the gradients that the parameters hold now: this process's share.

    The shares add up to the sum over all weights, whether they are sharded or each process holds a whole copy.
    """
    blocks = find_blocks(model).blocks
    totals = []
    for candidate in list_units(model, unit):
        weights = [parameter for parameter in _parameters(candidate, blocks) if parameter.grad is not None]
        found = [local_product(parameter, world_size) for parameter in weights]
        totals.append(sum(found, torch.zeros((), dtype=torch.float64)))
    return torch.stack(totals)


def _parameters(unit: Unit, blocks: nn.ModuleList) -> list[nn.Parameter]:
    return [parameter for module in (unit.parts or (blocks[unit.position],)) for parameter in module.parameters()]
