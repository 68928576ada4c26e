"""Observing a forward pass by temporarily replacing the blocks' own forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], make: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Give each block another `forward`. Attributes and hooks of the block itself remain in effect."""
    had = [vars(block).get("forward") for block in blocks]  # a forward set by a wrapper, if there is one
    try:
        for position, block in enumerate(blocks):
            block.forward = make(position, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, had, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                vars(block).pop("forward", None)


@contextmanager
def without_hooks(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Remove the blocks' hooks temporarily: an engine then does not gather parameters before each block's forward."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    had = [{name: vars(block)[name] for name in names} for block in blocks]
    try:
        for block in blocks:
            vars(block).update({name: OrderedDict() for name in names})
        yield
    finally:
        for block, hooks in zip(blocks, had, strict=True):
            vars(block).update(hooks)


def refuse_not_run(ran: Collection[int], depth: int) -> None:
    """Refuse a forward pass that skipped blocks.

    Raises:
        ValueError: Naming them.
    """
    if missing := sorted(set(range(depth)) - set(ran)):
        raise ValueError(
            f"Expected a forward pass that runs each layer, to score it, got one without the layers {missing}. Turn off an "
            "early exit, give calibration examples that use all layers (images, where layers look at them), or use a "
            "score that runs nothing, like 'last'."
        )
