"""Which layers of a model can be dropped, and how many, from its config alone: nothing is loaded or changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .adapters import adapters_of, base_of
from .blocks import find_blocks
from .drop import PlannedDrop, plan_drop
from .from_config import build_from_config
from .layer_pattern import refuse_unportable
from .sublayers import find_output_specs
from .trimmable import resolve_model

Planner = Callable[[list[int]], PlannedDrop]  # plans a drop of some positions, or raises a ValueError


@dataclass(frozen=True)
class Feasibility:
    """What can be dropped from a model.

    Attributes:
        num_layers: Its depth.
        alone: The positions of blocks that can be dropped alone.
        portable: Those of them after whose drop the layers' kinds are still what runtimes derive from a layer's number.
        refusals: The reasons for the others, by position.
        depths: The depths that can be reached, deepest first.
        sublayers: None if an attention or an MLP can be dropped alone, else the reason why not.
    """

    num_layers: int
    alone: tuple[int, ...]
    portable: tuple[int, ...]
    refusals: Mapping[int, str]
    depths: tuple[int, ...]
    sublayers: str | None


def feasible_drops(model: nn.Module, part: str | None = None) -> Feasibility:
    """Try dropping each block, as many blocks as possible, and a sublayer, on copies on the meta device.

    Args:
        model: A transformers model, unwrapped; it may be on the meta device.
        part: For an encoder-decoder, "decoder" or "encoder".

    Raises:
        ValueError: If the model has no single list of blocks.
    """
    target = resolve_model(model, part)
    alone, portable, refusals = [], [], {}
    for position in range(len(target.stack)):
        try:
            drop = plan_drop(target, [position])
            alone.append(position)
        except ValueError as error:
            refusals[position] = str(error)
            continue
        kept = [left for left in range(len(target.stack)) if left != position]
        with suppress(ValueError):
            refuse_unportable(target.stack.config, drop.config_values, kept)
            portable.append(position)
    try:
        find_output_specs(target.skeleton_stack.blocks[0], target.stack.config.hidden_size)
        without: str | None = "encoder-decoders lose whole blocks only" if target.stack.part else None
    except ValueError as error:
        without = str(error)
    return Feasibility(len(target.stack), tuple(alone), tuple(portable), refusals, tuple(_depths(model, part)), without)


def least_important(plan: Planner, scores: Mapping[int, float], most: int, usual: int = 1) -> PlannedDrop:
    """Plan to drop the least important layer that can be dropped; if none can, a few adjacent ones.

    Args:
        plan: Plans a drop of some positions, or raises a ValueError.
        scores: The scores of the positions that are not protected; among equal ones, the deepest is dropped first.
        most: How many layers may be dropped at once.
        usual: How many had to be dropped at once before; tried first.

    Raises:
        ValueError: If nothing can be dropped; with the reason for the least important layer.
    """
    refusal: ValueError | None = None
    for size in sorted(range(1, most + 1), key=lambda size: (size != usual, size)):
        runs = [[*range(first, first + size)] for first in scores]
        possible = [run for run in runs if all(position in scores for position in run)]
        for run in sorted(possible, key=lambda run: (sum(scores[position] for position in run), -run[0])):
            try:
                return plan(run)
            except ValueError as error:
                refusal = refusal or error
    raise refusal or ValueError(f"Expected layers that may go, got only protected ones beside {sorted(scores)}.")


def _depths(model: nn.Module, part: str | None) -> list[int]:
    """The depths that are reached when the deepest possible block is dropped each time."""
    base = base_of(model)
    copy: Any = build_from_config(base, {}, part, adapters_of(base))
    depth, size, found = len(find_blocks(copy, part)), 1, []
    while depth > 1:
        scores = {position: -float(position) for position in range(depth)}
        try:
            drop = least_important(partial(plan_drop, resolve_model(copy, part)), scores, depth - 1, size)
        except ValueError:
            break
        size = len(drop.positions)
        drop.apply(of_copy=True)
        depth -= size
        found.append(depth)
    return found
