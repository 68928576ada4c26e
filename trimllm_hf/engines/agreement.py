"""What processes agree on: a sum, or that one of them has failed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Alone:
    """A run of one process; see `engines.Engine`."""

    rank = 0
    world_size = 1
    sweeps = True

    def agree(self, total: torch.Tensor) -> torch.Tensor:
        """One process agrees with itself."""
        return total

    def fail(self, error: Exception) -> None:
        """There is nobody to tell."""


class Processes:
    """The processes of a run; see `engines.Engine`."""

    sweeps = True

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def agree(self, total: torch.Tensor) -> torch.Tensor:
        """The sum of `total` over the processes, in the order of their numbers; or the error of one that has failed.

        Raises:
            Exception: What another process passed to `fail`.
        """
        found = self._exchange((total.cpu(), None))
        for error in (error for _, error in found if error is not None):
            raise error
        summed: torch.Tensor = sum((part for part, _ in found[1:]), found[0][0])
        return summed.to(total.device)

    def fail(self, error: Exception) -> None:
        """Answer the others' `agree` with an error, which then stops them too. An error that came from there is theirs."""
        if not getattr(error, "from_another_process", False):
            self._exchange((None, error))

    def _exchange(self, mine: tuple[torch.Tensor | None, Exception | None]) -> list[Any]:
        everyones: list[Any] = [None] * self.world_size
        value, error = mine
        if error is not None:
            error.from_another_process = True  # type: ignore[attr-defined]  # to all but this one
        dist.all_gather_object(everyones, (value, error), group=self.group)
        return everyones
