"""Leave-one-out in one pass: every block runs once per batch, on the rows of all candidates at once.

At block i its input becomes a new candidate, "i skipped", which from then on is carried beside the model's own rows. So
the weights are read (under ZeRO-3 or FSDP: gathered) once per batch, and the arithmetic is half of a forward pass for each
candidate. What follows the last block is the model's own code, run once for each candidate with the blocks skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..engines import Gathered
from ..surgery.units import Unit, behind_hidden, block_input, block_output, without
from .calibration import Batch, model_inputs
from .calls import BROADCAST, PLAIN, Inputs, has_independent_rows, noted_calls, repeated
from .forwards import Forward, refuse_not_run, replaced_forwards, without_hooks
from .labelled import headless

Run = Callable[[], Any]  # what is computed for a batch: it calls the model
CPU_TOKENS = 1024  # tokens per call on the CPU: enough to use the cores, few enough to stay in the cache


@dataclass
class Sweep:
    """The hidden states that one batch's sweep carries: the model's own rows, then those of each candidate.

    Attributes:
        model: The unwrapped model, in evaluation mode, without gradients and without a cache.
        blocks: Its blocks.
        budget: Bytes that the candidates may take in addition to a forward pass.
        gathered: Keeps modules' parameters gathered while they are called, any number of times.
        only_output: Whether what is computed is the model's output, for which a sweep needs only the blocks' outputs.
        fits: Whether the blocks can be run on several candidates at once. If not, nothing was carried.
        tolerance: Mean change of the logits that rounding alone may cause, as a share of their mean magnitude.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    budget: float
    gathered: Gathered
    only_output: bool = True
    fits: bool = True
    tolerance: float = 1e-3
    _rests: list[tuple[Any, ...] | None] = field(default_factory=list)  # what a block returns after its hidden states
    _first: torch.Tensor | None = None  # the last block's hidden states without the first candidate, from a plain run
    _inputs: Inputs = field(default_factory=dict)  # the model's inputs
    _rows: int = 0
    _state_bytes: int = 1  # of the hidden states of a batch, in float32
    _chunks: list[torch.Tensor] = field(default_factory=list)  # the rows, in chunks of one call each
    _per_chunk: int = 1  # candidates per call
    # shapes of each block's arguments, for twice the rows
    _shapes: list[list[torch.Size | None]] = field(default_factory=list)

    def learn(self, run: Run) -> Any:
        """Learn the structure of each block's output from a run without the first candidate; returns the result of `run`.

        Raises:
            ValueError: If a block does not run, since it cannot be scored then.
        """
        self._rests = [None] * len(self.blocks)
        ran: set[int] = set()

        def learning(position: int, forward: Forward) -> Forward:
            def learn(*args: Any, **kwargs: Any) -> Any:
                ran.add(position)
                hidden = block_input(args, kwargs)
                if hidden.dtype != torch.float32 or torch.is_autocast_enabled(hidden.device.type):
                    self.tolerance = 0.05
                output = forward(*args, **kwargs)
                # tensors, such as attention weights, are not passed on to any block
                if (rest := behind_hidden(output)) is not None:
                    self._rests[position] = tuple(None if _tensors(item) else item for item in rest)
                self._first = block_output(output)
                return output

            return learn

        with replaced_forwards(self.blocks, learning):
            found = run()
        refuse_not_run(ran, len(self.blocks))
        return found

    def look(self, run: Run, batch: Batch) -> None:
        """Check how `run` calls the model for a batch: it fits only if called once, on independent rows."""
        if self.only_output:
            self._take(model_inputs(batch))
            return
        passes = [0] * len(self.blocks)

        def passing(position: int, forward: Forward) -> Forward:
            def count(*args: Any, **kwargs: Any) -> Any:
                passes[position] += 1
                return self._formed(position, block_input(args, kwargs))

            return count

        with self._passed_over(passing), noted_calls(self.model) as calls:
            run()
        self._take(calls[0] if calls else {})
        self.fits = self.fits and len(calls) == 1 and set(passes) == {1}

    def _take(self, inputs: Inputs) -> None:
        tensors = [value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in BROADCAST]
        self._rows = next((len(tensor) for tensor in tensors if tensor.dim() > 0), 0)
        self.fits = self._rows > 0 and has_independent_rows(self.model, inputs, self._rows)
        self._inputs = inputs

    def widen(self) -> None:
        """Record the shapes of every block's arguments for the doubled batch: what differs has one entry per row.

        The blocks are skipped, so only the modules around them are computed. A rule by size would be wrong wherever the
        number of heads or of tokens happens to equal the number of rows.
        """
        self._shapes = [[] for _ in self.blocks]

        def passing(position: int, forward: Forward) -> Forward:
            def note(*args: Any, **kwargs: Any) -> Any:
                leaves = tree_leaves((args, kwargs))
                if position == 0:
                    self._state_bytes = block_input(args, kwargs).numel() * 2  # for half of the rows, in float32
                self._shapes[position] = [leaf.shape if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
                return self._formed(position, block_input(args, kwargs))

            return note

        with self._passed_over(passing):
            self.model(**self._cheapest(repeated(self._inputs, self._rows)))

    def at_once(self, num_candidates: int) -> int:
        """The number of candidates per sweep that fit in half of the budget; the other half is working memory."""
        return max(1, min(num_candidates, int(self.budget / 2 // self._state_bytes) - 1))

    def run(self, candidates: Sequence[Unit]) -> None:
        """Carry the candidates along in one forward pass."""
        self._chunks, rows = [], self._rows
        last: torch.Tensor | None = None

        def carrying(position: int, forward: Forward) -> Forward:
            def carry(*args: Any, **kwargs: Any) -> Any:
                # on every process, whether or not the candidates fit on this one
                with self.gathered(self.blocks[position].modules()):
                    return carry_held(*args, **kwargs)

            def carry_held(*args: Any, **kwargs: Any) -> Any:
                nonlocal last
                hidden = block_input(args, kwargs)
                leaves, spec = tree_flatten((args, kwargs))
                flows = last is None or hidden is last or torch.equal(hidden, last.to(hidden.dtype))
                self.fits = self.fits and flows and self._can_widen(position, leaves, hidden, rows)
                if not self.fits:
                    return forward(*args, **kwargs)
                rest: tuple[Any, ...] | None = None
                if position == 0:
                    self._chunks = [hidden]
                with measured(self.blocks[position], position == 0) as workspace:
                    for number, chunk in enumerate(self._chunks):
                        times = len(chunk) // rows
                        wide = [
                            chunk.to(hidden.dtype)
                            if leaf is hidden
                            else _repeated(leaf, times)
                            if isinstance(leaf, torch.Tensor) and leaf.shape != self._shapes[position][i]
                            else leaf
                            for i, leaf in enumerate(leaves)
                        ]
                        wide_args, wide_kwargs = tree_unflatten(wide, spec)
                        output = forward(*wide_args, **wide_kwargs)
                        self._chunks[number] = block_output(output)
                        rest = behind_hidden(output) if number == 0 else rest
                if position == 0:
                    self._per_chunk = self._affordable(hidden, sum(workspace), len(candidates))
                for unit in candidates:
                    if unit.position == position:
                        self._add(hidden if not unit.parts else self._partly(unit, forward, args, kwargs), rows)
                last = self._chunks[0][:rows]
                return last if rest is None else (last, *rest)

            return carry

        with replaced_forwards(self.blocks, carrying):
            self.model(**self._cheapest(self._inputs))

    def outputs(self, run: Run, cut: Callable[[torch.Tensor], torch.Tensor]) -> Generator[Any, None, None]:
        """Yield what `run` computes without each carried candidate.

        Args:
            run: Calls the model on what was carried, or a part of its positions.
            cut: Selects the states of that part.
        """
        current: torch.Tensor

        def passing(position: int, forward: Forward) -> Forward:
            at_end = position == len(self.blocks) - 1
            return lambda *args, **kwargs: self._formed(position, current if at_end else block_input(args, kwargs))

        with self._passed_over(passing):
            for state in self._states():
                current = cut(state)  # `passing` reads it
                yield run()

    def is_right(self) -> bool:
        """Whether the first candidate's hidden states equal those of the plain run."""
        assert self._first is not None
        first, self._first = self._first, None
        return alike(next(iter(self._states())), first, self.tolerance)

    def _states(self) -> list[torch.Tensor]:
        return [state for chunk in self._chunks for state in chunk.split(self._rows)][1:]

    def forget(self) -> None:
        """Release the candidates."""
        self._chunks = []

    def _cheapest(self, inputs: Inputs) -> Inputs:
        return headless(self.model, inputs) if self.only_output else inputs

    @contextmanager
    def _passed_over(self, passing: Callable[[int, Forward], Forward]) -> Iterator[None]:
        """Replace the blocks' forward by `passing`; under an engine, each process may call them any number of times."""
        with self.gathered(self._around()), without_hooks(self.blocks), replaced_forwards(self.blocks, passing):
            yield

    def _around(self) -> list[nn.Module]:
        """The modules outside the blocks."""
        inside = {module for block in self.blocks for module in block.modules()}
        return [module for module in self.model.modules() if module not in inside]

    def _can_widen(self, position: int, leaves: list[Any], hidden: torch.Tensor, rows: int) -> bool:
        shapes = self._shapes[position]
        if len(hidden) != rows or len(leaves) != len(shapes):
            return False
        for leaf, wide in zip(leaves, shapes, strict=True):
            if not isinstance(leaf, torch.Tensor):
                if wide is not None or not isinstance(leaf, PLAIN):
                    return False
            elif leaf.shape != wide and (wide is None or wide != (2 * len(leaf), *leaf.shape[1:])):
                return False
        return True

    def _affordable(self, hidden: torch.Tensor, workspace: int, num_candidates: int) -> int:
        """How many candidates to run at a time."""
        left = self.budget - (num_candidates + 1) * hidden.nbytes
        by_memory = int(left // max(1, workspace + 2 * hidden.nbytes))
        if hidden.device.type == "cpu":
            by_memory = min(by_memory, CPU_TOKENS // max(1, hidden.shape[:-1].numel()))
        return max(1, by_memory)

    def _partly(self, unit: Unit, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        with without(unit, self.blocks):
            return block_output(forward(*args, **kwargs))

    def _add(self, state: torch.Tensor, rows: int) -> None:
        if len(self._chunks[-1]) // rows < self._per_chunk:
            self._chunks[-1] = torch.cat([self._chunks[-1], state])
        else:
            self._chunks.append(state)

    def _formed(self, position: int, hidden: torch.Tensor) -> Any:
        rest = self._rests[position]
        return hidden if rest is None else (hidden, *rest)


@contextmanager
def measured(block: nn.Module, on: bool) -> Iterator[list[int]]:
    """Sizes in bytes of the outputs of the modules in a block: an upper estimate of the memory of one call."""
    sizes: list[int] = []
    modules = list(block.modules()) if on else []
    handles = [
        module.register_forward_hook(lambda _, args, output: sizes.append(sum(tensor.nbytes for tensor in _tensors(output))))
        for module in modules
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    if len(tensor) == 1:
        return tensor.expand(times, *tensor.shape[1:])
    return tensor.repeat(times, *[1] * (tensor.dim() - 1)) if times > 1 else tensor


def alike(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal up to rounding."""
    one, other = (torch.nan_to_num(each.float()) for each in (one, other))
    return bool((one - other).abs().mean() <= tolerance * other.abs().mean())
