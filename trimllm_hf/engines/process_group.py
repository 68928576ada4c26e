"""What processes agree on: a sum, or that one of them has failed; and the process that is alone."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

LARGE = 2**16  # numbers, above which a sum goes over the backend's own path

Gathered = Callable[[Iterable[nn.Module]], AbstractContextManager[None]]


class ProcessGroup(Protocol):
    """The processes of a run. All of them make each of these calls, in the same order."""

    rank: int
    world_size: int
    free_backward: bool  # whether a backward pass beside training leaves nothing behind but `grad`

    def all_reduce(self, total: torch.Tensor) -> torch.Tensor:
        """The sum of `total` over all processes, the same on each of them; or the error of one that has failed."""

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, by the order of their numbers; or the error of one that has failed."""

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Replace a tensor on the device, such as a whole gradient, by its sum over all processes."""

    def raise_on_all(self, error: Exception) -> None:
        """Tell the processes that are at, or on their way to, `all_reduce` or `gather` that this one has failed."""

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Keep the modules' own parameters gathered while they are called, without gradients.

        Within, each process may call the modules a number of times of its own.
        """

    def heard(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, a forward pass raises the error of a process that has failed in it, instead of waiting for its shards."""


class SingleProcess:
    """One process, in which parameters are whole; see `engines.Engine`."""

    rank = 0
    world_size = 1
    free_backward = True

    def all_reduce(self, total: torch.Tensor) -> torch.Tensor:
        """No-op in one process."""
        return total

    def gather(self, value: Any) -> list[Any]:
        """The one process's value."""
        return [value]

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """No-op in one process."""

    def raise_on_all(self, error: Exception) -> None:
        """No-op in one process."""

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Parameters are always whole."""
        return nullcontext()

    def heard(self, model: nn.Module) -> AbstractContextManager[None]:
        """There is no other process."""
        return nullcontext()


@contextmanager
def all_or_none(process_group: ProcessGroup) -> Iterator[None]:
    """All processes go on behind the block, or none does: an error in one is raised on all."""
    try:
        yield
    except Exception as error:
        process_group.raise_on_all(error)
        raise
    process_group.all_reduce(torch.zeros(1))


class DistributedProcesses:
    """The processes of a run; see `engines.Engine`."""

    free_backward = True
    _is_held = False

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def all_reduce(self, total: torch.Tensor) -> torch.Tensor:
        """The sum of `total` over the processes, in the order of their numbers; or the error of one that has failed.

        A large one is summed where it lies, in the order that the backend takes.

        Raises:
            Exception: What another process passed to `raise_on_all`.
        """
        if total.numel() > LARGE:
            self.gather(None)  # or the error of one that has failed
            summed = total.clone()
            dist.all_reduce(summed, group=self.group)
            return summed
        parts = self.gather(total.cpu())
        summed = sum(parts[1:], parts[0])
        return summed.to(total.device)

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, by the order of their numbers; or the error of one that has failed.

        Raises:
            Exception: What another process passed to `raise_on_all`.
        """
        found = self._exchange((value, None))
        for rank, (_, told) in enumerate(found):
            if told is not None:
                name, text = told
                raise _error_of(name, text, rank)
        return [part for part, _ in found]

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Parameters are always whole, where an engine does not say otherwise."""
        return nullcontext()

    @contextmanager
    def heard(self, model: nn.Module) -> Iterator[None]:
        """Each module that gathers its shards asks first whether all processes have come so far."""
        waits = [module for module in model.modules() if self.waits(module)]
        handles = [module.register_forward_pre_hook(lambda *_: self._hear(), prepend=True) for module in waits]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def waits(self, module: nn.Module) -> bool:
        """Whether a call of the module waits for the other processes: none does, where an engine does not say otherwise."""
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, parameters are gathered: a call waits for nobody, and each process may make as many as it likes."""
        self._is_held, before = True, self._is_held
        try:
            yield
        finally:
            self._is_held = before

    def _hear(self) -> None:
        if not self._is_held:
            self.gather(None)

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        dist.all_reduce(tensor, group=self.group)

    def raise_on_all(self, error: Exception) -> None:
        """Raise `error` on the processes at, or on their way to, `all_reduce` or `gather`; nothing if it came from there."""
        if not getattr(error, "is_known_to_all", False):
            error.is_known_to_all = True  # type: ignore[attr-defined]
            self._exchange((None, _told(error)))

    def _exchange(self, mine: tuple[Any, tuple[str, str] | None]) -> list[Any]:
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, mine, group=self.group)
        return everyones


def _told(error: Exception) -> tuple[str, str]:
    """An error as two texts: the object itself may hold what cannot be sent."""
    whole = len(error.args) == 1 and isinstance(error.args[0], str)
    return type(error).__name__, error.args[0] if whole else str(error)


def _error_of(name: str, text: str, rank: int) -> Exception:
    """The error that another process has told of: of the same class where Python has one of that name."""
    kind: Any = getattr(builtins, name, None)
    known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
    error: Any = kind(text) if known else RuntimeError(f"Process {rank} failed: {name}: {text}")
    error.is_known_to_all = True
    return error
