"""FSDP2 (`fully_shard`): the root forgets the shards' managers of the layers that left. Nothing is gathered.

The private names of torch that are used here are checked by `tests/test_private_names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .engine import Changes, Engine, RemovedParameters
from .local import refuse_hidden_parameters
from .parameter_groups import remove_from_optimizer
from .process_group import DistributedProcesses, ProcessGroup

T = TypeVar("T")


class FSDPEngine(DistributedProcesses, Engine):
    """A model under FSDP2; see `engines.Engine`."""

    restores_layers = False

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Any = None) -> None:
        if not isinstance(model, FSDPModule):
            raise ValueError(
                f"Expected a model under FSDP2 (fully_shard), got {type(model).__name__}: FSDP1 cannot lose layers while "
                "it trains. Set fsdp_version: 2 in the accelerate config, or in TrainingArguments' fsdp_config."
            )
        refuse_hidden_parameters(optimizer)
        self.model = model
        self.optimizer = optimizer
        self.plugin = None if accelerator is None else accelerator.state.fsdp_plugin
        super().__init__()

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Gather once, and leave it to the end to shard again what each forward would."""
        self.gather(None)  # or the error of a process that has failed, for which this one would wait in the gather
        held = [module for module in modules if isinstance(module, FSDPModule)]
        groups = [group for module in held for group in _param_groups(module)]
        meshes = [group.post_forward_mesh_info for group in groups]
        for module in held:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            with self.held():
                yield
        finally:
            for group, mesh in zip(groups, meshes, strict=True):
                group.post_forward_mesh_info = mesh
            for module in held:
                if any(group.post_forward_mesh_info is not None for group in _param_groups(module)):
                    module.reshard()

    def waits(self, module: nn.Module) -> bool:
        """Each module that was sharded gathers before it is called."""
        return isinstance(module, FSDPModule)

    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit`, mend the optimizer, and take what left out of the lists of the root and of the groups."""
        self._reshard()
        before = _states(self.model)
        dropped = removed_parameters()
        result = edit()
        remove_from_optimizer(self.optimizer, dropped, self.schedulers)
        staying = _states(self.model)
        gone = {id(state) for state in before} - {id(state) for state in staying}
        root = self.model._get_fsdp_state()
        if root._is_root:  # it is not known before the first forward pass, which makes the lists
            root._state_ctx.all_states[:] = [s for s in root._state_ctx.all_states if id(s) not in gone]
        self._forget_in_groups(dropped)
        for state in staying:
            for name in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
                getattr(state, name)[:] = [s for s in getattr(state, name) if id(s) not in gone]
        root._comm_ctx.post_forward_order.clear()
        if root._is_root:
            root._init_fqns()
        return result

    def _reshard(self) -> None:
        """An evaluation leaves gathered parameters in place of those that the optimizer has."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _forget_in_groups(self, dropped: list[nn.Parameter]) -> None:
        """Of a block that stays, a sublayer may have gone: its group gathers the rest."""
        left, modules = {id(parameter) for parameter in dropped}, set(self.model.modules())
        for module in modules:
            if not isinstance(module, FSDPModule):
                continue
            for group in _param_groups(module):
                group.fsdp_params[:] = [p for p in group.fsdp_params if id(p.sharded_param) not in left]
                for name in ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"):
                    handles = getattr(group, name)
                    for gone in [held for held in handles if held not in modules]:
                        del handles[gone]

    @torch.no_grad()
    def add(self, changes: Changes) -> None:
        """Each process adds to its shard what is its share of the change."""
        self._reshard()
        for parameter, change in changes:
            if isinstance(parameter, DTensor):
                change = change.to(parameter.to_local().device)
                # cut without asking the other processes: each has the whole change
                change = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(parameter.float() + change)

    def save_whole(self) -> None:
        """A Trainer saves what Accelerate's plugin names: one whole model, or a shard for each process."""
        if self.plugin is not None:
            self.plugin.set_state_dict_type("FULL_STATE_DICT")

    @classmethod
    @contextmanager
    def unprepared(cls, accelerator: Any, model: nn.Module) -> Iterator[ProcessGroup]:
        """Each process has the whole model, on the CPU."""
        yield DistributedProcesses()

    @classmethod
    def place_frozen(cls, accelerator: Any, model: nn.Module) -> Any:
        """In shards, as the model that trains."""
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)


def _param_groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one
    return [group for group in (several or [state._fsdp_param_group]) if group is not None]


def _states(model: nn.Module) -> list[Any]:
    return [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
