"""Gaps: runs of consecutive dropped layers, and the places before and after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...layer_map import LayerMap
from ..adapters import base_of
from ..blocks import find_blocks


@dataclass(frozen=True)
class Place:
    """A place in the stack of blocks where hidden states are read.

    Attributes:
        position: Position of a block.
        inside: Whether it is between the block's attention and MLP; else it is after the block.
    """

    position: int
    inside: bool = False


@dataclass(frozen=True)
class Gap:
    """A run of consecutive dropped layers.

    Attributes:
        before: The place in front of them, after the last kept layer; None if no layer before them is kept.
        last: The place after the last of them.
        name: Their name in messages.
    """

    before: Place | None
    last: Place
    name: str

    def __str__(self) -> str:
        return self.name


def places(model: nn.Module, unit: str, part: str | None = None) -> list[Place]:
    """The place after each layer, in the order in which a drop counts them: blocks, or `LayerMap.sublayers`."""
    base = base_of(model)
    if unit == "block":
        return [Place(position) for position in range(len(find_blocks(base, part)))]
    layer_map = LayerMap.from_config(base.config, part)
    positions = [layer_map.kept_layers.index(layer) for layer, _ in layer_map.sublayers]
    return [Place(position, inside=positions[number + 1 :][:1] == [position]) for number, position in enumerate(positions)]


def find_gaps(behind: Sequence[Place], layers: Sequence[int], unit: str) -> list[Gap]:
    """The gaps left by dropping some layers, from the input side.

    Args:
        behind: The place after each layer of the model.
        layers: The layers to drop.
        unit: "block" or "sublayer".
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    what = "layer" if unit == "block" else unit
    return [
        Gap(
            behind[run[0] - 1] if run[0] else None,
            behind[run[-1]],
            f"{what} {run[0]}" if len(run) == 1 else f"{what}s {run[0]} to {run[-1]}",
        )
        for run in runs
    ]
