"""Probes a model: what its blocks return, and where they add to the hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ...engines import ProcessGroup
from ..blocks import find_blocks
from ..units import Unit, behind_hidden, block_output, list_units, without
from .gaps import Place
from .output_projection import OutputProjection, find_output_projection
from .repair import Form, answering


def probe(
    base: nn.Module,
    ends: Collection[Place],
    inputs: Mapping[str, Any],
    unit: str,
    part: str | None,
    process_group: ProcessGroup,
) -> tuple[list[Form], dict[Place, OutputProjection]]:
    """Run a model once, some of its blocks several times.

    Returns:
        What each block returns after its hidden states, and the projections at the places in `ends`.
    """
    blocks = list(find_blocks(base, part).blocks)
    mlps = _mlps(base) if any(place.inside for place in ends) else {}
    shared = _shared_parameters(base)
    forms: list[Form] = [None] * len(blocks)
    projections: dict[Place, OutputProjection | None] = {}

    def looking(position: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if (rest := behind_hidden(output)) is not None:
                forms[position] = tuple(torch.empty(0) if isinstance(item, torch.Tensor) else item for item in rest)
            for place in sorted((p for p in ends if p.position == position), key=lambda p: p.inside):
                with without(mlps[position], blocks) if place.inside else nullcontext():
                    projections[place] = find_output_projection(
                        blocks[position], lambda: block_output(forward(*args, **kwargs)), shared
                    )
            return output

        return run

    with ExitStack() as stack:
        for position, block in enumerate(blocks):
            stack.enter_context(answering(block, looking(position, block.forward)))
        base(**inputs)
    everyones = process_group.gather(projections)
    return forms, {place: projection for place, projection in everyones[0].items() if all(each[place] for each in everyones)}


def _mlps(base: nn.Module) -> dict[int, Unit]:
    """The MLP of each block that has an attention in front of it, by the block's position."""
    found: dict[int, list[Unit]] = {}
    for unit in list_units(base, "sublayer"):
        found.setdefault(unit.position, []).append(unit)
    return {position: units[1] for position, units in found.items() if len(units) == 2}


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters, by `id`, that more than one module holds."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {parameter for parameter, times in held.items() if times > 1}
