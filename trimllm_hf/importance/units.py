"""What a scan leaves out: a block, or parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..stack import find_stack


@dataclass(frozen=True)
class Unit:
    """A candidate for a drop.

    Attributes:
        position: Position of its block.
        parts: The modules inside the block that would go. None at all: the whole block.
    """

    position: int
    parts: tuple[nn.Module, ...] = ()


def list_units(model: nn.Module, unit: str) -> list[Unit]:
    """The candidates of a model, in the order of their scores.

    Raises:
        ValueError: If there is no unit of that name.
    """
    if unit != "block":
        raise ValueError(f"Expected unit='block', got {unit!r}.")
    return [Unit(position) for position in range(len(find_stack(model)))]


@contextmanager
def without(unit: Unit, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run a model as if the unit were not there. It still runs, so that its output's form is right everywhere.

    A block hands its input on; a part gives zeros, which the residual connection around it adds.
    """
    with ExitStack() as stack:
        for module, replace in [(part, _zeros) for part in unit.parts] or [(blocks[unit.position], _input)]:
            stack.callback(module.register_forward_hook(replace, with_kwargs=True).remove)
        yield


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(output: Any) -> torch.Tensor:
    """The hidden states that a block returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return _like(output, lambda hidden: block_input(args, kwargs))


def _zeros(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return _like(output, torch.zeros_like)


def _like(output: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    hidden = make(block_output(output))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
