"""Engines: what has to be mended around a model when layers leave it while it trains.

An engine holds a prepared model and its optimizer. It is handed the edit, so it knows neither surgery nor scores, and it
changes objects in place: every reference that a Trainer, an Accelerator or a user's script holds stays valid.
`local.py` shows the contract at its simplest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .agreement import Alone, Processes
from .ddp import DDPEngine
from .local import Leaving, LocalEngine

T = TypeVar("T")


class Crew(Protocol):
    """The processes of a run, and what they agree on."""

    rank: int
    world_size: int
    sweeps: bool  # whether processes may call a block different numbers of times

    def agree(self, total: torch.Tensor) -> torch.Tensor:
        """The sum of `total` over all processes, the same on each of them; or the error of one that has failed."""

    def fail(self, error: Exception) -> None:
        """Tell the processes that are at, or on their way to, `agree` that this one has failed."""


class Engine(Crew, Protocol):
    """What the callback needs of an engine."""

    def edit(self, edit: Callable[[], T], leaving: Leaving) -> T:
        """Run `edit`, which takes modules out of the unwrapped model, and mend optimizer and wrapper.

        `leaving` names the parameters that go with them; an engine asks when its parameters are as the optimizer has them.

        Parameters that stay keep their optimizer state, bit by bit; those that went are held by nothing here.
        """


@contextmanager
def unprepared(accelerator: Accelerator, model: nn.Module) -> Iterator[Crew]:
    """The processes of a run whose model no engine holds yet; within, forward passes of the model work.

    They run where the model is: under FSDP2, and ZeRO-3 where the model was not made in shards, that is the CPU.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        yield Alone()
        return
    crew = Processes()
    if kind != DistributedType.DEEPSPEED:
        yield crew
        return
    from .deepspeed import gathered_by_module, is_sharded

    crew.sweeps = not is_sharded(model)
    if accelerator.state.deepspeed_plugin.zero_stage < 3:
        model.to(accelerator.device)  # as DeepSpeed will
    with gathered_by_module(model):
        yield crew


def attach(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Engine:
    """The engine for a model and an optimizer as `accelerator.prepare` returned them.

    Raises:
        ValueError: If the model is prepared in a way that cannot be trimmed, or the optimizer keeps what cannot be
            mended; the message says what to use instead. Nothing has changed.
    """
    kind = accelerator.distributed_type
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Expected one model a process, got torch.nn.DataParallel. Launch with torchrun or accelerate launch "
            "(DistributedDataParallel), or show one device to the process (CUDA_VISIBLE_DEVICES=0)."
        )
    if kind == DistributedType.NO:
        return LocalEngine(model, optimizer)
    if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU):
        return DDPEngine(model, optimizer, accelerator.ddp_handler)
    if kind == DistributedType.FSDP:
        from .fsdp import FSDPEngine

        return FSDPEngine(model, optimizer)
    if kind == DistributedType.DEEPSPEED:
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer)
    raise ValueError(
        f"Expected one process, DistributedDataParallel, FSDP2 or DeepSpeed ZeRO, got {kind.value}. Layers cannot be "
        "dropped under it: launch with one of those."
    )
