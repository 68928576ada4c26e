"""Optimizer state under ZeRO, taken out of flat partitions and written into new ones, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .engine import Changes

WEIGHT = None  # the key of a parameter's fp32 copy, beside its state's keys like "exp_avg"


class LocalState:
    """ZeRO-3: each parameter is cut on its own, so a process keeps the shards that it has. Nothing is gathered."""

    def __init__(self, zero: Any, groups: list[list[nn.Parameter]]) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        self.scalars, self.keys = _scalars_and_keys(zero)
        self.saved: dict[nn.Parameter, dict[str | None, torch.Tensor]] = {}
        for parameter in _all(groups):
            shards: dict[str | None, torch.Tensor] = {WEIGHT: safe_get_local_fp32_param(parameter).to("cpu", copy=True)}
            for key in self.keys:
                shards[key] = safe_get_local_optimizer_state(parameter, key).to("cpu", copy=True)
            self.saved[parameter] = shards

    def write(self, zero: Any) -> None:
        """Write everything into a new ZeRO optimizer of the same parameters."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        _empty_state(zero, self.scalars, self.keys)
        for parameter, shards in self.saved.items():
            for key, shard in shards.items():
                shard = shard.to(parameter.device)
                if key is WEIGHT:
                    safe_set_local_fp32_param(parameter, shard)
                else:
                    safe_set_local_optimizer_state(parameter, shard, key)
        self.saved.clear()


class SpreadState:
    """ZeRO-1 and 2: partitions cut across parameters, and the cuts move.

    Each parameter is assembled once, one at a time, and kept by one process, so that each holds about its share; writing
    back broadcasts one at a time.
    """

    def __init__(self, zero: Any, groups: list[list[nn.Parameter]]) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            # DeepSpeed links the state when the first group has it: the later groups' would be missing
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        self.scalars, self.keys = _scalars_and_keys(zero)
        self.keeper = _spread(groups)
        self.saved: dict[nn.Parameter, dict[str | None, torch.Tensor]] = {}
        for parameter in _all(groups):
            mine: dict[str | None, torch.Tensor] = {}
            for key in (WEIGHT, *self.keys):
                full = (
                    safe_get_full_fp32_param(parameter) if key is WEIGHT else safe_get_full_optimizer_state(parameter, key)
                )
                if self.keeper[parameter] == dist.get_rank():
                    mine[key] = full.to("cpu", copy=True)
            self.saved[parameter] = mine

    def write(self, zero: Any) -> None:
        """Write everything into a new ZeRO optimizer of the same parameters."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        _empty_state(zero, self.scalars, self.keys)
        if self.keys and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, mine in self.saved.items():
            for key in (WEIGHT, *self.keys):
                if mine:
                    full = mine.pop(key).to(parameter.device)
                else:
                    full = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                dist.broadcast(full, src=self.keeper[parameter])
                if key is WEIGHT:
                    safe_set_full_fp32_param(parameter, full)
                else:
                    safe_set_full_optimizer_state(parameter, full, key)
        self.saved.clear()


@torch.no_grad()
def add_to_sharded(changes: Changes) -> None:
    """Add to parameters under ZeRO: to the fp32 copies of those that train, and to the parameters themselves."""
    from deepspeed import utils
    from deepspeed.runtime.zero import GatheredParameters

    for parameter, change in changes:
        change, cut = change.to(parameter.device), hasattr(parameter, "ds_id")
        full: torch.Tensor | None = None
        if parameter.requires_grad:
            if cut:
                held = utils.safe_get_local_fp32_param(parameter)
                utils.safe_set_local_fp32_param(parameter, held + _share(parameter, change).to(held.device))
            else:
                utils.safe_set_full_fp32_param(parameter, utils.safe_get_full_fp32_param(parameter) + change)
            full = utils.safe_get_full_fp32_param(parameter).reshape(change.shape)
        # of the whole ones, what the first process has is cut anew
        with GatheredParameters([parameter], modifier_rank=0, enabled=cut):
            parameter.copy_(parameter.float() + change if full is None else full)


def _share(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that is cut as a ZeRO-3 parameter is: flat, the last one filled up with zeros."""
    size = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    share = torch.zeros(size, dtype=whole.dtype, device=whole.device)
    mine = whole.flatten()[start : start + size]
    share[: len(mine)] = mine
    return share


def _all(groups: list[list[nn.Parameter]]) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group


def _flat_partitions(zero: Any) -> list[tuple[int, torch.Tensor]]:
    """The flat fp32 partitions that the basic optimizer steps on, each with the number of its group."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return [(zero.sub_group_to_group_id[i], flat) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(enumerate(zero.single_partition_of_fp32_groups))
    return list(enumerate(zero.fp32_groups_flat_partition))


def _scalars_and_keys(zero: Any) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """For each group the state that is no tensor of the partition's shape (like the step), and the keys of those that are.

    Before the first step there is neither. The keys are sorted: each process must walk through them alike.
    """
    scalars: dict[int, dict[str, Any]] = {}
    keys: list[str] = []
    for group, flat in _flat_partitions(zero):
        for key, value in zero.optimizer.state.get(flat, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == flat.shape:
                if key not in keys:
                    keys.append(key)
            else:
                scalars.setdefault(group, {})[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return scalars, sorted(keys)


def _empty_state(zero: Any, scalars: dict[int, dict[str, Any]], keys: list[str]) -> None:
    """State of the right form in a new ZeRO optimizer, to be written into."""
    if not keys and not scalars:
        return
    for group, flat in _flat_partitions(zero):
        state = zero.optimizer.state[flat]
        for key in keys:
            state[key] = torch.zeros_like(flat, requires_grad=False)
        for key, value in scalars.get(group, {}).items():
            state[key] = value.clone() if isinstance(value, torch.Tensor) else value


def _spread(groups: list[list[nn.Parameter]]) -> dict[nn.Parameter, int]:
    """Which process keeps which parameter's state: the one with the least so far, the same answer on each."""
    load = [0] * dist.get_world_size()
    keeper: dict[nn.Parameter, int] = {}
    for parameter in sorted(_all(groups), key=lambda parameter: -parameter.numel()):
        keeper[parameter] = min(range(len(load)), key=load.__getitem__)
        load[keeper[parameter]] += parameter.numel()
    return keeper
