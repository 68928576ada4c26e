"""`Repair`: the changes in the blocks in front of the gaps; previewed on an unchanged model, or added to its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters import base_of
from ..blocks import find_blocks
from ..units import block_input, list_units, without
from .gaps import Gap
from .output_projection import OutputProjection

Form = tuple[Any, ...] | None  # what a block returns after its hidden states; None: it returns only these, not in a tuple


@dataclass(frozen=True)
class Refit:
    """The change in the block in front of a gap.

    Attributes:
        gap: The gap.
        position: The position of the block in front of it.
        projection: The projection that adds to the hidden states.
        changes: What to add to the block's parameters, by their names in it; float32, unsharded.
        closing: A copy of the norm at the end of the last dropped block, which replaces this block's own; None if blocks
            do not end with a norm.
    """

    gap: Gap
    position: int
    projection: OutputProjection
    changes: Mapping[str, torch.Tensor]
    closing: nn.Module | None = None

    @contextmanager
    def previewed(self, block: nn.Module) -> Iterator[None]:
        """Run a block as if it had changed."""
        module = block.get_submodule(self.projection.name)
        weight, bias = (self.changes.get(f"{self.projection.name}.{name}") for name in ("weight", "bias"))
        assert weight is not None
        linear = weight.T if isinstance(module, Conv1D) else weight

        def add(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            with torch.autocast(output.device.type, enabled=False):
                change = nn.functional.linear(args[0].float(), linear, bias)
            return output + change.to(output.dtype)

        def close(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            assert self.closing is not None
            closed: torch.Tensor = self.closing(*args)
            return closed

        with ExitStack() as stack:
            stack.callback(module.register_forward_hook(add).remove)
            if self.closing is not None and self.projection.norm is not None:
                stack.callback(block.get_submodule(self.projection.norm).register_forward_hook(close).remove)
            yield


@dataclass(frozen=True)
class Repair:
    """The changes that compensate a model for the loss of some layers.

    Attributes:
        layers: The layers, by their positions in the model before they are dropped.
        refits: The changes in front of the gaps.
        unrepaired: The gaps in front of which nothing changes, each with the reason.
        forms: What each block returns after its hidden states; None: it returns only these, not in a tuple.
        unit: What a layer is: "block" or "sublayer".
        part: For an encoder-decoder, the stack that the blocks belong to.
    """

    layers: tuple[int, ...]
    refits: tuple[Refit, ...]
    unrepaired: Mapping[Gap, str]
    forms: Sequence[Form]
    unit: str = "block"
    part: str | None = None

    @contextmanager
    def previewed(self, model: nn.Module, refitted: bool = True) -> Iterator[None]:
        """Run a model as if the layers were dropped. Its parameters are not changed, sharded or not.

        Args:
            model: The model that the repair was fitted on, with all its layers.
            refitted: Whether to run it as if it were repaired as well; else as after a plain drop.
        """
        blocks = find_blocks(base_of(model), self.part).blocks
        with ExitStack() as stack:
            for refit in self.refits if refitted else ():
                stack.enter_context(refit.previewed(blocks[refit.position]))
            units = list_units(model, self.unit, self.part)
            for number in self.layers:
                form = self.forms[units[number].position]
                if self.unit == "block" and not any(isinstance(item, torch.Tensor) for item in form or ()):
                    stack.enter_context(answering(blocks[number], _passing(form)))
                else:  # T5's blocks pass on a position bias
                    stack.enter_context(without(units[number], list(blocks)))
            yield

    def changes(self, model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The parameters to change before the layers are dropped, each with what to add to it.

        Args:
            model: The model that the repair was fitted on, with all its layers.
        """
        blocks = find_blocks(base_of(model), self.part).blocks
        return [
            (blocks[refit.position].get_parameter(name), change)
            for refit in self.refits
            for name, change in refit.changes.items()
        ]


def _passing(form: Form) -> Callable[..., Any]:
    """A forward that passes the block's input on without computation."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = block_input(args, kwargs)
        return hidden if form is None else (hidden, *form)

    return hand_on


@contextmanager
def answering(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a block another `forward`. Attributes and hooks of the block itself remain in effect."""
    had = vars(block).get("forward")  # a forward set by a wrapper, if there is one
    block.forward = forward
    try:
        yield
    finally:
        if had is not None:
            block.forward = had
        else:
            vars(block).pop("forward", None)
