"""Engines: what has to be mended around a model when layers leave it while it trains.

An engine holds a prepared model and its optimizer. It is handed the edit, so it knows neither surgery nor scores, and it
changes objects in place: every reference that a Trainer, an Accelerator or a user's script holds stays valid.
`local.py` shows the contract at its simplest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_compiled_module
from torch import nn

from .ddp import DDPEngine
from .local import Changes, LocalEngine, RemovedParameters
from .process_group import DistributedProcesses, ProcessGroup, SingleProcess

T = TypeVar("T")


class Engine(ProcessGroup, Protocol):
    """What the callback needs of an engine."""

    restores_layers: bool  # whether `edit` may bring in parameters that the optimizer does not have

    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit`, which takes modules out of the unwrapped model, and mend optimizer and wrapper.

        `removed_parameters` returns the parameters that go with them; an engine calls it while its parameters are as the
        optimizer has them.

        Remaining parameters keep their optimizer state, bit by bit; the engine keeps no reference to removed ones.
        """

    def add(self, changes: Changes) -> None:
        """Add to parameters, also to the copies that the optimizer steps on. The changes are whole, on every process."""

    def save_whole(self) -> None:
        """From now on a Trainer's save writes the whole model, also where its checkpoints hold shards."""


@contextmanager
def unprepared(accelerator: Accelerator, model: nn.Module) -> Iterator[ProcessGroup]:
    """The processes of a run whose model no engine holds yet; within, forward passes of the model work.

    They run where the model is: under FSDP2, and ZeRO-3 where the model was not made in shards, that is the CPU.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        yield SingleProcess()
    elif kind != DistributedType.DEEPSPEED:
        yield DistributedProcesses()
    else:
        from . import deepspeed_shards

        with deepspeed_shards.unprepared(accelerator, model) as process_group:
            yield process_group


def attach(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Engine:
    """The engine for a model and an optimizer as `accelerator.prepare` returned them.

    Raises:
        ValueError: If the model is prepared in a way that cannot be trimmed, or the optimizer keeps what cannot be
            mended; the message says what to use instead. Nothing has changed.
    """
    kind = accelerator.distributed_type
    if is_compiled_module(model):
        model = model._orig_mod  # type: ignore[assignment]  # compiled anew after a drop
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Expected one model a process, got torch.nn.DataParallel. Launch with torchrun or accelerate launch "
            "(DistributedDataParallel), or show one device to the process (CUDA_VISIBLE_DEVICES=0)."
        )
    _refuse_cut_layers(accelerator, model)
    if kind == DistributedType.NO:
        return LocalEngine(model, optimizer)
    if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU):
        return DDPEngine(model, optimizer, accelerator.ddp_handler)
    if kind == DistributedType.FSDP:
        from .fsdp import FSDPEngine

        return FSDPEngine(model, optimizer, accelerator.state.fsdp_plugin)
    if kind == DistributedType.DEEPSPEED:
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer)
    raise ValueError(
        f"Expected one process, DistributedDataParallel, FSDP2 or DeepSpeed ZeRO, got {kind.value}. Layers cannot be "
        "dropped under it: launch with one of those."
    )


def _refuse_cut_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse what cuts a layer's arithmetic among processes, beside or instead of data parallelism."""
    parallelism = accelerator.parallelism_config
    refused = {
        "tensor": (parallelism is not None and parallelism.tp_enabled) or (getattr(model, "tp_size", None) or 1) > 1,
        "context": parallelism is not None and parallelism.cp_enabled,
        "sequence": parallelism is not None and parallelism.sp_enabled,
    }
    for name, found in refused.items():
        if found:
            raise ValueError(
                f"Expected data parallelism alone, got {name} parallelism. Layers cannot be dropped under it: leave it out, "
                "and use FSDP2 or DeepSpeed ZeRO-3 for a model that does not fit one device."
            )


def refuse_other_processes(accelerator: Accelerator, saved: int | None) -> None:
    """Refuse a checkpoint that `saved` processes (None: not known) made, where the engine can only resume it with as many.

    Raises:
        ValueError: Saying how to resume it. Nothing has changed.
    """
    if saved is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        from .deepspeed import refuse_other_processes

        refuse_other_processes(accelerator.state.deepspeed_plugin, saved, accelerator.num_processes)
