"""ZeRO-3 before its engine: a model that was made in shards (by `from_pretrained` after the TrainingArguments)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn

from .process_group import DistributedProcesses


class Shards(DistributedProcesses):
    """The processes of a run whose model is in shards; see `engines.Engine`."""

    def waits(self, module: nn.Module) -> bool:
        """Each module gathers its own parameters."""
        return has_shards(module)

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Gather once; the modules' own hooks find everything there."""
        with _gathered([parameter for module in modules for parameter in module.parameters(recurse=False)]), self.held():
            yield


@contextmanager
def unprepared(accelerator: Accelerator, model: nn.Module) -> Iterator[DistributedProcesses]:
    """See `Engine.unprepared`. Each module of a model in shards gathers its own parameters for its own forward."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        if accelerator.state.deepspeed_plugin.zero_stage < 3:
            model.to(accelerator.device)  # as DeepSpeed will
        yield DistributedProcesses()
        return
    held: dict[nn.Module, list[Any]] = {}

    def gather(module: nn.Module, _: Any) -> None:
        gathered = _gathered(list(module.parameters(recurse=False)))
        gathered.__enter__()
        held.setdefault(module, []).append(gathered)

    def release(module: nn.Module, *_: Any) -> None:
        if held.get(module):
            held[module].pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(gather, prepend=True))
            handles.append(module.register_forward_hook(release, always_call=True))
    try:
        yield Shards()
    finally:
        for handle in handles:
            handle.remove()


def has_shards(module: nn.Module) -> bool:
    """Whether a module has parameters of its own that are cut into shards."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


def _gathered(parameters: list[nn.Parameter]) -> Any:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    apart = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
    return GatheredParameters(apart, enabled=bool(apart))
