"""The hidden states of calibration batches, block by block, in the stock model and in the sliced one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..surgery.blocks import find_blocks
from .memory import release_freed_memory
from .principal import Covariance, refuse_not_finite
from .wiring import Block

INFLUENCE_TOKENS = 16_384  # over which block influence is averaged, if there are more


class _Reached(Exception):
    """Ends a forward pass once everything needed has been recorded."""


class Calls:
    """The arguments of the blocks' calls for one batch.

    Args:
        states: The hidden states at the input of the first block, of shape (rows, tokens, width).
        arguments: The other arguments of each block, positional and named.
        mask: Which tokens are not padding, of shape (rows, tokens); None: all.
        room: Where the hidden states are stored between blocks; see `_room`.

    Attributes:
        arguments: The other arguments of each block, positional and named.
        mask: Which tokens are not padding, of shape (rows, tokens); None: all.
    """

    def __init__(
        self,
        states: torch.Tensor,
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]],
        mask: torch.Tensor | None,
        room: torch.Tensor,
    ) -> None:
        self.arguments, self.mask, self._dtype = arguments, mask, states.dtype
        self._states = room.view(states.shape)
        self.states = states

    @property
    def states(self) -> torch.Tensor:
        """The hidden states at the input of the next block, of shape (rows, tokens, width)."""
        return self._states.to(self._dtype)

    @states.setter
    def states(self, states: torch.Tensor) -> None:
        self._states.copy_(states)

    def run(self, number: int, block: nn.Module, states: torch.Tensor | None = None) -> torch.Tensor:
        """A block's output for the stored states, or for other ones."""
        args, kwargs = self.arguments[number]
        return _first(block(self.states if states is None else states, *args, **kwargs))


@torch.no_grad()
def record(
    model: PreTrainedModel,
    batch: dict[str, Any],
    see: Callable[[int, torch.Tensor, Any], None] | None,
    room: torch.Tensor,
) -> Calls:
    """Run a model on a batch, up to its last block, and record the arguments of its blocks.

    Args:
        model: The stock model, in evaluation mode.
        batch: The model's inputs; labels are left out.
        see: Called with each block's number, input and output. None: the blocks are skipped and pass their input on.
        room: Where the hidden states are stored.

    Raises:
        ValueError: If the blocks take something else than one hidden state per token.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    states: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[:-1] != inputs["input_ids"].shape or hidden.numel() != room.numel():
            raise ValueError(
                f"Expected blocks that take hidden states of shape (rows, tokens, width), got {tuple(hidden.shape)} for "
                f"{tuple(inputs['input_ids'].shape)} tokens in {type(model).__name__}. This architecture cannot be sliced. "
                "Nothing was changed."
            )
        states[:] = [hidden] if not states else [states[0], hidden]
        arguments.append((args[1:], rest))

    def behind(_: nn.Module, args: Any, output: Any) -> None:
        if see is not None:
            see(len(arguments) - 1, states[-1], output)
        if len(arguments) == len(blocks):
            raise _Reached

    blocks = find_blocks(model).blocks
    with ExitStack() as stack:
        for module in blocks:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(behind).remove)
            if see is None:
                stack.enter_context(instead(module, lambda hidden_states, *_, **__: hidden_states))
        try:
            model(**inputs, use_cache=False)
        except _Reached:
            pass
    return Calls(states[0], arguments, mask if mask is not None and mask.dim() == 2 else None, room)


def _room(model: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
    """Memory for the hidden states of each batch: 16 bits a number, since those of all batches take the most.

    It is one tensor, made ahead of the activations: smaller ones between these would keep freed memory from being reused.
    """
    dtype = model.dtype if model.dtype.itemsize <= 2 else torch.bfloat16
    sizes = [batch["input_ids"].numel() * model.config.get_text_config().hidden_size for batch in batches]
    return torch.empty(sum(sizes), dtype=dtype, device=model.device).split(sizes)


def observe(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], done: Callable[[int], Any]
) -> tuple[list[Calls], list[float]]:
    """Record the blocks' arguments and each block's influence: 1 - cosine of input and output, mean over tokens.

    With many batches, an evenly spaced subset is used for the influence. `done` is called with the number of blocks run.

    Raises:
        ValueError: If hidden states are not finite.
    """
    depth = len(find_blocks(model))
    sums = torch.zeros(depth, dtype=torch.float64)
    counts = [float(b["input_ids"].numel() if (m := b.get("attention_mask")) is None else (m != 0).sum()) for b in batches]
    every = max(1, int(sum(counts) / INFLUENCE_TOKENS))
    calls, count = [], 0.0
    for number, (batch, room) in enumerate(zip(batches, _room(model, batches), strict=True)):
        mask = batch.get("attention_mask")

        def see(block: int, x: torch.Tensor, output: Any, mask: torch.Tensor | None = mask) -> None:
            nonlocal every
            if isinstance(output, tuple | list):  # only the block knows the other elements
                every = 1
            distance = 1 - torch.cosine_similarity(x.float(), _first(output).float(), dim=-1)
            sums[block] += (distance if mask is None else distance.masked_fill(mask == 0, 0)).sum().double().cpu()

        seen = number % every == 0
        calls.append(record(model, batch, see if seen else None, room))
        count += counts[number] if seen else 0.0
        release_freed_memory()
        done(depth)
    refuse_not_finite(sums)  # a cosine is undefined for states that are not finite
    return calls, (sums / count).tolist()


@torch.no_grad()
def gather(calls: Sequence[Calls], number: int, module: nn.Module, block: Block, done: Callable[[], Any]) -> Covariance:
    """The covariance of the hidden states that a block reads: at its first norm and, if there is another, at its second.

    `done` is called after each batch.
    """
    found = Covariance(calls[0].states.shape[-1], calls[0].states.device)
    for call in calls:
        states = call.states
        found.add(states, call.mask)

        def see(second: torch.Tensor, call: Calls = call, shape: torch.Size = states.shape) -> None:
            found.add(second.view(shape), call.mask)
            raise _Reached

        if not block.parallel:
            with at(module, block.mlp.norm, see):
                try:
                    call.run(number, module, states)
                except _Reached:
                    pass
        done()
    release_freed_memory()
    return found


@torch.no_grad()
def advance(
    calls: Sequence[Calls], number: int, module: nn.Module, block: Block, basis: torch.Tensor, done: Callable[[], Any]
) -> None:
    """Run a block in a reduced basis: its input, and what its attention adds, are projected onto the basis.

    What its MLP adds is not projected, since the next basis is computed from it. `done` is called after each batch.
    """
    cut = (basis @ basis.T).to(next(module.parameters()).dtype)
    for call in calls:
        states = call.states @ cut
        if block.parallel:
            call.states = call.run(number, module, states)
        else:
            lost: list[torch.Tensor] = []

            def narrow(states: torch.Tensor, lost: list[torch.Tensor] = lost) -> torch.Tensor:
                kept = states @ cut
                lost.append(states - kept)
                return kept

            with at(module, block.mlp.norm, narrow):
                result = call.run(number, module, states)
            call.states = result - lost[0].view(result.shape)
        release_freed_memory()
        done()


def _first(output: Any) -> torch.Tensor:
    """The hidden states in a block's output: the output itself, or its first item."""
    found: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


@contextmanager
def at(module: nn.Module, name: str, do: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Call a function with the input of a module inside a block; it may return a replacement."""
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: do(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's forward with another function."""
    had = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            vars(module).pop("forward")
        else:
            module.forward = had
