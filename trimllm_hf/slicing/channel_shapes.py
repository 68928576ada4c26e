"""An MLP's channels: which rows and columns of its matrices hold them, and how to keep a subset of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..surgery.blocks import find_blocks, find_sublayers
from .modules import assign, matrix_sizes, resize
from .wiring import MATRICES


@dataclass(frozen=True)
class Channels:
    """An MLP's channels, by the names of its matrices in the block.

    Attributes:
        block: The block's name in the model.
        readers: The matrices that produce them, each with the number of times it holds them: 2 where gate and up projection
            are one matrix.
        writer: The matrix that takes them as its input.
        width: How many there are.
    """

    block: str
    readers: tuple[tuple[str, int], ...]
    writer: str
    width: int


def find_channels(model: nn.Module) -> list[Channels]:
    """Each block's channels.

    Raises:
        ValueError: If the MLPs do not consist of matrices that read the hidden states and one that writes them.
    """
    stack = find_blocks(model)
    full: int = stack.config.hidden_size
    found = []
    for number, block in enumerate(stack.blocks):
        modules = find_sublayers(block).mlp
        matrices = [
            (f"{name}.{inner}" if inner else name, part)
            for name, module in modules.items()
            for inner, part in module.named_modules()
            if isinstance(part, MATRICES)
        ]
        sizes = {name: matrix_sizes(part) for name, part in matrices}
        writer = matrices[-1][0] if matrices else ""
        width = sizes[writer][0] if matrices else 0
        readers = tuple((name, outputs // width) for name, (_, outputs) in sizes.items() if name != writer)
        right = [sizes[name] == (full, width * runs) and runs in (1, 2) for name, runs in readers]
        others = {p for module in modules.values() for p in module.parameters()} - {
            p for _, part in matrices for p in part.parameters()
        }
        if not readers or not all(right) or sizes[writer][1] != full or others:
            raise ValueError(
                f"Expected MLPs of matrices that read the hidden states and one that writes them, got {list(modules)} in "
                f"{type(block).__name__}. Its channels cannot be cut. Nothing was changed."
            )
        found.append(Channels(f"{stack.name}.{number}", readers, writer, width))
    return found


def keep(module: nn.Module, channels: Channels, kept: torch.Tensor) -> None:
    """Keep some channels of a block's MLP, in place."""
    for name, runs in channels.readers:
        matrix: Any = module.get_submodule(name)
        rows = torch.cat([kept + run * channels.width for run in range(runs)])
        transposed = not isinstance(matrix, nn.Linear)
        weight = matrix.weight.data
        if matrix.bias is not None:
            assign(module, f"{name}.bias", matrix.bias.data[rows])
        assign(module, f"{name}.weight", weight[:, rows] if transposed else weight[rows])
    writer: Any = module.get_submodule(channels.writer)
    weight = writer.weight.data
    assign(module, f"{channels.writer}.weight", weight[:, kept] if isinstance(writer, nn.Linear) else weight[kept])


def shape_channels(model: nn.Module, widths: Sequence[int]) -> None:
    """Give a stock model MLPs of other widths, in place; the values of its weights are meaningless afterwards."""
    for channels, width in zip(find_channels(model), widths, strict=True):
        module = model.get_submodule(channels.block)
        for name, runs in channels.readers:
            resize(module.get_submodule(name), outputs=width * runs)
        resize(module.get_submodule(channels.writer), inputs=width)
