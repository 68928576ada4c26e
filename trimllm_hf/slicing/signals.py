"""The hidden states of calibration batches, block by block: as they are, and as a sliced model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .principal import Covariance
from .wiring import Block, Wiring


class _Reached(Exception):
    """Ends a forward pass where all that is asked of it has been seen."""


@dataclass
class Calls:
    """What the blocks were called with for one batch.

    Attributes:
        states: The hidden states in front of the block that is next, of shape (rows, tokens, width).
        arguments: The other arguments of each block, positional and named.
        mask: Which tokens are real, of shape (rows, tokens); None: all.
    """

    states: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: torch.Tensor | None

    def run(self, number: int, block: nn.Module) -> torch.Tensor:
        """A block's result for the states."""
        args, kwargs = self.arguments[number]
        output = block(self.states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def record(
    model: PreTrainedModel, wiring: Wiring, batch: dict[str, Any], see: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> Calls:
    """Run a model on a batch, up to its last norm, and note what its blocks are called with.

    Args:
        model: The stock model, in evaluation mode.
        wiring: What reads and writes its hidden states.
        batch: What it is called with; labels are left out.
        see: Is shown each block's number, input and output.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    states: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        states[:] = [hidden] if not states else [states[0], hidden]
        arguments.append((args[1:], rest))

    def behind(_: nn.Module, args: Any, output: Any) -> None:
        see(len(arguments) - 1, states[-1], output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for block in wiring.blocks:
            module = model.get_submodule(block.name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(behind).remove)
        stack.callback(model.get_submodule(wiring.norm).register_forward_pre_hook(_stop).remove)
        try:
            model(**inputs, use_cache=False)
        except _Reached:
            pass
    return Calls(states[0], arguments, mask if mask is not None and mask.dim() == 2 else None)


def _stop(*_: Any) -> None:
    raise _Reached


@torch.no_grad()
def gather(calls: Sequence[Calls], number: int, module: nn.Module, block: Block, done: Callable[[], Any]) -> Covariance:
    """The covariance of the hidden states that a block reads: at its first norm, and, if it is another, at its second.

    `done` is called after each batch.
    """
    found = Covariance(calls[0].states.shape[-1], calls[0].states.device)
    for call in calls:
        found.add(call.states, call.mask)
        if not block.parallel:
            with _at(module, block.mlp.norm, partial(_seen, found, call)):
                try:
                    call.run(number, module)
                except _Reached:
                    pass
        done()
    return found


def _seen(found: Covariance, call: Calls, states: torch.Tensor) -> None:
    found.add(states.view(call.states.shape), call.mask)
    raise _Reached


@torch.no_grad()
def advance(
    calls: Sequence[Calls], number: int, module: nn.Module, block: Block, basis: torch.Tensor, done: Callable[[], Any]
) -> None:
    """Move the states behind a block that works in a basis: what it reads, and what its attention adds, is cut to it.

    What its MLP adds is whole: the next basis is found with it. `done` is called after each batch.
    """
    cut = (basis @ basis.T).to(calls[0].states.dtype)
    for call in calls:
        call.states = call.states @ cut
        if block.parallel:
            call.states = call.run(number, module)
        else:
            lost: list[torch.Tensor] = []

            def narrow(states: torch.Tensor, lost: list[torch.Tensor] = lost) -> torch.Tensor:
                kept = states @ cut
                lost.append(states - kept)
                return kept

            with _at(module, block.mlp.norm, narrow):
                result = call.run(number, module)
            call.states = result - lost[0].view(result.shape)
        done()


@contextmanager
def _at(module: nn.Module, name: str, do: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """What a module inside a block reads is shown to a function, and may be changed by it."""
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: do(args[0]))
    try:
        yield
    finally:
        handle.remove()
