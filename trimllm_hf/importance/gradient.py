"""Scores from gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..engines import ProcessGroup, is_sharded, local_product
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.units import Unit, list_units
from .calibration import Batch
from .finite import refuse_not_finite
from .metrics import Loss, own_loss


def taylor(
    model: nn.Module,
    batches: Sequence[Batch],
    num_counted: int,
    unit: str,
    process_group: ProcessGroup,
    loss: Loss = own_loss,
    part: str | None = None,
) -> torch.Tensor:
    """Sum |w * dL/dw| over a layer's weights, L the mean loss: Shortened LLaMA's Taylor (arXiv 2402.02834, §2.2).

    Here L is the loss per token on the calibration set. `TrimCallback` instead uses the gradient that training has just
    computed, if there is one, which needs no extra pass. The parameters' own gradients are left as they were.

    Args:
        model: The model, in evaluation mode.
        batches: This process's batches, the same number on every process.
        num_counted: How many of them count; the rest only keep the processes in step.
        unit: "block".
        process_group: The processes of the run.
        loss: Returns a batch's mean loss, and the number of labels that it is the mean of.
        part: For an encoder-decoder, the stack that the layers belong to.

    Raises:
        ValueError: If a batch has no labels, a layer has no gradient, a score is not finite, or the engine does not expose
            gradients (ZeRO).
    """
    refuse_no_gradient(process_group)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    units, blocks = _units(model, unit, part)
    layers = list(range(len(units)))
    wrong: list[tuple[list[int], int]] = []
    had = [parameter.grad for parameter in parameters]
    total, scale = 0.0, 0.0
    try:
        for parameter in parameters:
            parameter.grad = None
        for position, batch in enumerate(batches):
            with torch.enable_grad():
                mean, count = loss(model, batch)
                scale = scale or max(process_group.gather(count)) or 1.0  # keeps the gradients at the scale of a mean
                counted = count if position < num_counted else 0.0
                total += counted / scale
                if counted and not torch.isfinite(mean):
                    wrong.append((layers, position))
                # sharded gradients are averaged over the processes
                copies = process_group.world_size if any(map(is_sharded, parameters)) else 1
                (mean * (counted / scale * copies)).backward()
        total = sum(process_group.gather(total))
        if not total:
            raise ValueError("Expected calibration batches with labels, got labels that are all -100.")
        if absent := set.intersection(*process_group.gather(_without_gradient(units, blocks))):
            raise ValueError(
                f"Expected a gradient of each layer to score it by 'taylor', got none of the layers {sorted(absent)}: they "
                "did not run, or their weights are frozen. Use another importance, like 'sensitivity'."
            )
        for parameter in parameters:
            if process_group.world_size > 1 and not is_sharded(parameter):
                # an expert may have had tokens only on another process
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                process_group.sum_in_place(parameter.grad)
        scores = process_group.all_reduce(weights_times_gradients(model, unit, process_group.world_size, part)) / total
        refuse_not_finite("taylor", scores, process_group.gather(wrong))
        return scores
    finally:
        for parameter, gradient in zip(parameters, had, strict=True):
            parameter.grad = gradient


def refuse_no_gradient(process_group: ProcessGroup) -> None:
    """Refuse an engine that provides no gradients outside of training.

    Raises:
        ValueError: With what to use instead.
    """
    if not process_group.free_backward:
        raise ValueError(
            "Expected one process, DDP or FSDP2 for the importance 'taylor', got an engine that keeps "
            "gradients to itself. Use another importance, like 'sensitivity' or 'block_influence'."
        )


def refuse_frozen(model: nn.Module, unit: str, part: str | None = None) -> None:
    """Refuse layers with frozen weights, which have no gradient: their share would be missing from the score.

    Raises:
        ValueError: Naming the layers.
    """
    units, blocks = _units(model, unit, part)
    frozen = [unit.position for unit in units if not all(p.requires_grad for p in _parameters(unit, blocks))]
    if frozen:
        raise ValueError(
            f"Expected all weights of the layers to train, to score them by gradients, got frozen ones in the layers "
            f"{frozen} (adapters, trainable_ratio). Use another importance, like 'sensitivity' or 'block_influence'."
        )


@torch.no_grad()
def weights_times_gradients(model: nn.Module, unit: str, world_size: int, part: str | None = None) -> torch.Tensor:
    """Sum |w * dL/dw| over each unit's weights, from the parameters' current gradients: this process's share.

    The shares add up to the sum over all weights, whether they are sharded or each process holds a whole copy. A unit
    without any gradients did not run: its sum is NaN, not 0.
    """
    units, blocks = _units(model, unit, part)
    totals = []
    for candidate in units:
        held = _parameters(candidate, blocks)
        found = [local_product(parameter, world_size) for parameter in held if parameter.grad is not None]
        absent = torch.nan if held and not found else 0.0
        totals.append(sum(found, torch.tensor(absent, dtype=torch.float64)))
    return torch.stack(totals)


def _units(model: nn.Module, unit: str, part: str | None) -> tuple[list[Unit], nn.ModuleList]:
    return list_units(model, unit, part), find_blocks(base_of(model), part).blocks


def _without_gradient(units: Sequence[Unit], blocks: nn.ModuleList) -> set[int]:
    """The units that have no gradients at all."""
    return {i for i, unit in enumerate(units) if (held := _parameters(unit, blocks)) and all(p.grad is None for p in held)}


def _parameters(unit: Unit, blocks: nn.ModuleList) -> list[nn.Parameter]:
    return [parameter for module in (unit.parts or (blocks[unit.position],)) for parameter in module.parameters()]
