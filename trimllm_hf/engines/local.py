"""One process: the optimizer forgets the parameters that left. The contract at its simplest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .engine import Changes, Engine, RemovedParameters
from .parameter_groups import remove_from_optimizer, torch_optimizer
from .process_group import ProcessGroup, SingleProcess

T = TypeVar("T")


class LocalEngine(SingleProcess, Engine):
    """A model and an optimizer in no parallel wrapper; see `engines.Engine`."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Any = None) -> None:
        self.model = model
        self.optimizer = optimizer
        refuse_hidden_parameters(optimizer)

    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit` and take the parameters that leave the model out of the optimizer."""
        gone = removed_parameters()
        result = edit()
        remove_from_optimizer(self.optimizer, gone, self.schedulers)
        return result

    def add(self, changes: Changes) -> None:
        """Add to the parameters that the optimizer has."""
        add_whole(changes)

    @classmethod
    @contextmanager
    def unprepared(cls, accelerator: Any, model: nn.Module) -> Iterator[ProcessGroup]:
        """One process."""
        yield SingleProcess()


@torch.no_grad()
def add_whole(changes: Changes) -> None:
    """Add to parameters that are whole; the sum is rounded once."""
    for parameter, change in changes:
        parameter.copy_(parameter.float() + change.to(parameter.device))


def refuse_hidden_parameters(optimizer: Any) -> None:
    """Refuse an optimizer that holds parameters where `remove_from_optimizer` cannot reach.

    Raises:
        ValueError: Naming the attribute.
    """
    optimizer = torch_optimizer(optimizer)
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state"):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        if any(isinstance(item, torch.Tensor) and id(item) in parameters for item in items):
            raise ValueError(
                f"Expected an optimizer that keeps its state per parameter, got {type(optimizer).__name__}, which also "
                f"holds parameters in its attribute {name!r}. Use one like AdamW, SGD or Adafactor."
            )
