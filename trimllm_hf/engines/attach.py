"""Which engine is for which of Accelerate's types."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_compiled_module
from torch import nn

from .ddp import DDPEngine
from .deepspeed import DeepSpeedEngine
from .engine import Engine
from .fsdp import FSDPEngine
from .local import LocalEngine

ENGINES: dict[DistributedType, type[Engine]] = {
    DistributedType.NO: LocalEngine,
    DistributedType.MULTI_CPU: DDPEngine,
    DistributedType.MULTI_GPU: DDPEngine,
    DistributedType.MULTI_XPU: DDPEngine,
    DistributedType.FSDP: FSDPEngine,
    DistributedType.DEEPSPEED: DeepSpeedEngine,
}


def engine_class(accelerator: Accelerator) -> type[Engine]:
    """The class of the engine that a run uses.

    Raises:
        ValueError: If there is none for it.
    """
    kind = accelerator.distributed_type
    if kind not in ENGINES:
        raise ValueError(
            f"Expected one process, DistributedDataParallel, FSDP2 or DeepSpeed ZeRO, got {kind.value}. Layers cannot be "
            "dropped under it: launch with one of those."
        )
    return ENGINES[kind]


def attach(accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any = None) -> Engine:
    """The engine for a model and an optimizer as `accelerator.prepare` returned them.

    Args:
        accelerator: The Accelerator.
        model: The model.
        optimizer: The optimizer.
        scheduler: What steps its learning rates; None: those that were prepared with it.

    Raises:
        ValueError: If the model is prepared in a way that cannot be trimmed, or the optimizer keeps what cannot be
            mended; the message says what to use instead. Nothing has changed.
    """
    if is_compiled_module(model):
        model = model._orig_mod  # type: ignore[assignment]  # compiled anew after a drop
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Expected one model a process, got torch.nn.DataParallel. Launch with torchrun or accelerate launch "
            "(DistributedDataParallel), or show one device to the process (CUDA_VISIBLE_DEVICES=0)."
        )
    _refuse_cut_layers(accelerator, model)
    engine = engine_class(accelerator)(model, optimizer, accelerator)
    prepared = [each for each in getattr(accelerator, "_schedulers", ()) if optimizer in each.optimizers]
    engine.schedulers = [scheduler] if scheduler is not None else prepared or None
    return engine


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
