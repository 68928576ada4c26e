"""The contract of an engine: what has to be mended around a model when layers leave it while it trains.

An engine holds a prepared model and its optimizer. It is handed the edit, so it knows neither surgery nor scores, and it
changes objects in place: every reference that a Trainer, an Accelerator or a user's script holds stays valid.
`local.py` shows the contract at its simplest, and `attach.py` says which class is for which of Accelerate's types.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from .process_group import ProcessGroup

T = TypeVar("T")
RemovedParameters = Callable[[], list[nn.Parameter]]
Changes = Sequence[tuple[nn.Parameter, torch.Tensor]]


class Engine(ProcessGroup, ABC):
    """A model and an optimizer as `accelerator.prepare` returned them; what it inherits says what processes agree on.

    Attributes:
        restores_layers: Whether `edit` may bring in parameters that the optimizer does not have.
        schedulers: All that step the optimizer's learning rates; None: not known.
    """

    restores_layers = True
    schedulers: Sequence[Any] | None = None

    @abstractmethod
    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator | None = None) -> None:
        """Take up what was prepared.

        Raises:
            ValueError: If it cannot be trimmed; the message says what to use instead. Nothing has changed.
        """

    @abstractmethod
    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit`, which takes modules out of the unwrapped model, and mend optimizer and wrapper.

        Remaining parameters keep their optimizer state, bit by bit; the engine keeps no reference to removed ones.

        Args:
            edit: Changes the model.
            removed_parameters: Returns the parameters that go with the layers; called while they are as the optimizer
                has them.
        """

    @abstractmethod
    def add(self, changes: Changes) -> None:
        """Add to parameters, also to the copies that the optimizer steps on. The changes are whole, on every process."""

    def groups_to_fill(self) -> list[list[nn.Parameter]]:
        """The optimizer's groups of parameters, where none of them may become empty."""
        return []

    def save_whole(self) -> None:
        """From now on a Trainer's save writes the whole model, also where its checkpoints hold shards."""

    @classmethod
    @abstractmethod
    def unprepared(cls, accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[ProcessGroup]:
        """The processes of a run whose model is not prepared yet; within, forward passes of the model work.

        They run where the model is: under FSDP2, and ZeRO-3 where the model was not made in shards, that is the CPU.
        """

    @classmethod
    def place_frozen(cls, accelerator: Accelerator, model: nn.Module) -> Any:
        """Prepare a model that will only be evaluated; what is returned is called in its place.

        Args:
            accelerator: The Accelerator, after it has prepared the model that trains.
            model: A whole model, the same on each process, whose parameters need no gradients.
        """
        return model.to(accelerator.device)

    @classmethod
    def refuse_other_processes(cls, accelerator: Accelerator, saved: int) -> None:
        """Refuse a checkpoint of `saved` processes where the engine can only resume it with as many.

        Raises:
            ValueError: Saying how to resume it. Nothing has changed.
        """
