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

from ..surgery.blocks import find_blocks
from .principal import Covariance
from .wiring import Block


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
def record(model: PreTrainedModel, batch: dict[str, Any], see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Calls:
    """Run a model on a batch, up to its last block, and note what its blocks are called with.

    Args:
        model: The stock model, in evaluation mode.
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
        if len(arguments) == len(blocks):
            raise _Reached

    blocks = find_blocks(model).blocks
    with ExitStack() as stack:
        for module in blocks:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(behind).remove)
        try:
            model(**inputs, use_cache=False)
        except _Reached:
            pass
    return Calls(states[0], arguments, mask if mask is not None and mask.dim() == 2 else None)


def observe(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], done: Callable[[], Any]
) -> tuple[list[Calls], list[float]]:
    """What the blocks are called with, and each one's block influence: 1 - cosine of input and output, mean over tokens.

    `done` is called after each block and batch.

    Raises:
        ValueError: If hidden states are no finite numbers.
    """
    sums = torch.zeros(len(find_blocks(model)), dtype=torch.float64)
    count = 0.0
    calls = []
    for batch in batches:
        mask = batch.get("attention_mask")

        def see(number: int, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = mask) -> None:
            distance = 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)
            sums[number] += (distance if mask is None else distance.masked_fill(mask == 0, 0)).sum().double().cpu()
            done()

        calls.append(record(model, batch, see))
        count += float(batch["input_ids"].numel() if mask is None else (mask != 0).sum())
    influence = (sums / count).tolist()
    if not all(abs(value) < 3 for value in influence):  # a cosine is none of a state that is no number
        raise ValueError(
            f"Expected hidden states that are finite numbers on the calibration batches, got others: {influence}. Load the "
            "model in float32 or bfloat16. Nothing was changed."
        )
    return calls, influence


@torch.no_grad()
def gather(calls: Sequence[Calls], number: int, module: nn.Module, block: Block, done: Callable[[], Any]) -> Covariance:
    """The covariance of the hidden states that a block reads: at its first norm, and, if it is another, at its second.

    `done` is called after each batch.
    """
    found = Covariance(calls[0].states.shape[-1], calls[0].states.device)
    for call in calls:
        found.add(call.states, call.mask)
        if not block.parallel:
            with at(module, block.mlp.norm, partial(_seen, found, call)):
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

            with at(module, block.mlp.norm, narrow):
                result = call.run(number, module)
            call.states = result - lost[0].view(result.shape)
        done()


@contextmanager
def at(module: nn.Module, name: str, do: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Show what a module inside a block reads to a function, which may return something else for it."""
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: do(args[0]))
    try:
        yield
    finally:
        handle.remove()
