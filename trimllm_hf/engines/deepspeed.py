"""DeepSpeed ZeRO-1, 2 and 3: the flat partitions are made anew, and the survivors' state is written back into them.

The engine is taken apart and the same object initialized again, around the same module and with the same basic optimizer
(the torch or DeepSpeed optimizer inside). Accelerate's optimizer wrapper gets the new ZeRO optimizer, so that all of a
Trainer's references stay valid.

Each private name of DeepSpeed that is used here is checked by `tests/test_private_names.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .deepspeed_shards import has_shards, unprepared
from .engine import Changes, Engine, RemovedParameters
from .process_group import DistributedProcesses, ProcessGroup
from .sharded_state import LocalState, SpreadState, add_to_sharded

T = TypeVar("T")

_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "_global_grad_norm", "lr_scheduler")


class DeepSpeedEngine(DistributedProcesses, Engine):
    """A model in DeepSpeed's engine under ZeRO; see `engines.Engine`."""

    restores_layers = False
    free_backward = False

    def __init__(self, model: Any, optimizer: Any, accelerator: Any = None) -> None:
        refuse_unsupported(model)
        self.wrapper: Any = model
        self.optimizer = optimizer  # Accelerate's wrapper around the ZeRO optimizer
        super().__init__()

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """ZeRO-3: gather once, and take off the hooks that would gather, release and record at each call."""
        if self.wrapper.zero_optimization_stage() < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        offload = self.wrapper.optimizer.parameter_offload
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():  # what it has fetched ahead by its record of training is on the way
            coordinator._invalidate_trace()
        self.gather(None)  # or the error of a process that has failed, for which this one would wait in the gather
        modules = list(modules)
        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        apart = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
        fetching = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
        had = [(module, name, vars(module)[name]) for module in modules for name in _MODULE_HOOKS]
        with GatheredParameters(apart, enabled=bool(apart)), self.held():
            try:
                for module, name, hooks in had:
                    vars(module)[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in fetching)
                yield
            finally:
                for module, name, hooks in had:
                    vars(module)[name] = hooks

    def waits(self, module: nn.Module) -> bool:
        """ZeRO-3: each module gathers its own parameters."""
        return self.wrapper.zero_optimization_stage() == 3 and has_shards(module)

    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit` and partition what stays anew; parameters, moments and steps read back bit by bit."""
        from deepspeed.runtime.config import DeepSpeedConfig

        zero, basic = self.wrapper.optimizer, self.wrapper.optimizer.optimizer
        dropped = removed_parameters()
        gone = {id(parameter) for parameter in dropped}
        groups = [[parameter for parameter in group if id(parameter) not in gone] for group in param_groups(zero)]
        if not all(groups):
            raise ValueError(
                "Expected every parameter group of the optimizer to keep a parameter, got one whose parameters would "
                "all be dropped, which DeepSpeed cannot hold. Put a layer that stays into the group, or merge groups."
            )
        stage = self.wrapper.zero_optimization_stage()
        state = (LocalState if stage == 3 else SpreadState)(zero, groups)
        modules = list(self.wrapper.module.modules())
        result = edit()

        counters = {name: getattr(self.wrapper, name) for name in _COUNTERS if hasattr(self.wrapper, name)}
        scaler = getattr(zero, "loss_scaler", None)
        for hook in (self.wrapper.module_forward_pre_hook, self.wrapper.module_forward_post_hook):
            hook.remove()
        self.wrapper.destroy()
        if stage == 3:
            _empty_fetcher(zero)
        basic.state.clear()
        for group, parameters in zip(basic.param_groups, groups, strict=True):
            group["params"] = parameters
        module, config = self.wrapper.module, _without_scheduler(self.wrapper.config)
        _forget_functions(modules)
        staying = set(self.wrapper.module.modules())
        _release(dropped, [module for module in modules if module not in staying])
        _forget_partitions([parameter for group in groups for parameter in group])
        self.optimizer.optimizer = None
        del zero, groups
        # The same object is initialized again, as deepspeed.initialize does with a new one: a second engine would be
        # destroyed when Python collects it, and take the hooks and marks that both hold off the parameters.
        self.wrapper.__dict__.clear()
        self.wrapper.__init__(
            args=None, model=module, optimizer=basic, config=config, config_class=DeepSpeedConfig(copy.deepcopy(config))
        )

        zero = self.wrapper.optimizer
        if scaler is not None:
            zero.loss_scaler = scaler
        self.wrapper.__dict__.update(counters)
        state.write(zero)
        self.optimizer.optimizer = zero
        return result

    def add(self, changes: Changes) -> None:
        """Add to the fp32 copies, and give the model's parameters what these are then."""
        add_to_sharded(changes)

    def groups_to_fill(self) -> list[list[nn.Parameter]]:
        """All groups: none may become empty."""
        return param_groups(self.wrapper.optimizer)

    def save_whole(self) -> None:
        """ZeRO-3 gathers the weights for a Trainer's save only if the config says so."""
        self.wrapper._config.zero_config.gather_16bit_weights_on_model_save = True

    @classmethod
    def unprepared(cls, accelerator: Any, model: nn.Module) -> AbstractContextManager[ProcessGroup]:
        """Each module of a model that was made in shards gathers its own parameters for its own forward."""
        return unprepared(accelerator, model)

    @classmethod
    def place_frozen(cls, accelerator: Any, model: nn.Module) -> Any:
        """Under ZeRO-3 in shards, in an engine of its own; else whole, on the device."""
        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        if config["zero_optimization"]["stage"] < 3:
            return model.to(accelerator.device)
        import deepspeed

        for name in ("optimizer", "scheduler"):
            config.pop(name, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()  # returns nothing in DeepSpeed 0.19
        return engine

    @classmethod
    def refuse_other_processes(cls, accelerator: Any, saved: int) -> None:
        """ZeRO's partitions fit as many processes as saved them."""
        refuse_other_partitions(accelerator.state.deepspeed_plugin, saved, accelerator.num_processes)


def refuse_other_partitions(plugin: Any, saved: int, running: int) -> None:
    """Refuse to resume partitions that another number of processes saved, unless they are read as universal ones.

    Under ZeRO-3 universal ones are refused too: DeepSpeed 0.19 gives all parameter groups the settings of the first one
    (weight decay) and one step counter, which then counts each group's step.

    Raises:
        ValueError: With what to do instead.
    """
    config = plugin.deepspeed_config
    universal = config.get("checkpoint", {}).get("load_universal", False)
    if saved == running or (universal and plugin.zero_stage < 3):
        return
    convert = (
        "run `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder "
        "CHECKPOINT/global_stepN --output_folder CHECKPOINT/global_stepN_universal` and set "
        '"checkpoint": {"load_universal": true} in the DeepSpeed config'
    )
    instead = "DeepSpeed cannot read ZeRO-3's into other ones rightly" if plugin.zero_stage == 3 else f"or {convert}"
    raise ValueError(
        f"Expected a checkpoint that {running} processes saved, got one of {saved}: ZeRO's partitions do not fit. "
        f"Launch {saved} processes; {instead}."
    )


def refuse_unsupported(engine: Any) -> None:
    """Refuse what is not ZeRO-1, 2 or 3 in its plain form.

    Raises:
        ValueError: Naming the setting.
    """
    import deepspeed
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise ValueError(
            f"Expected the model as accelerator.prepare returned it (a DeepSpeed engine), got {type(engine).__name__}. "
            "Pass the wrapped model."
        )
    zero = engine._config.zero_config
    offloads = [zero.offload_optimizer, zero.offload_param]
    refused = {
        "pipeline parallelism": isinstance(engine, PipelineEngine),
        "ZeRO stage 0": engine.zero_optimization_stage() == 0,
        "offload to NVMe": any(offload is not None and offload.device == "nvme" for offload in offloads),
        "ZeRO++ (zero_hpz_partition_size)": zero.zero_hpz_partition_size > 1,
        "ZeRO++ (zero_quantized_weights)": bool(zero.zero_quantized_weights),
        "ZeRO++ (zero_quantized_gradients)": bool(zero.zero_quantized_gradients),
        "tensor parallelism": engine.autotp_size() > 1,
        "sequence parallelism": getattr(engine, "sequence_parallel_size", 1) > 1,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "torch.compile": getattr(engine, "is_compiled", False),
        "mixture-of-experts groups": engine.has_moe_layers,
    }
    for name, found in refused.items():
        if found:
            raise ValueError(
                f"Expected plain ZeRO-1, 2 or 3, got {name} in the DeepSpeed config. Layers cannot be dropped under it: "
                "use ZeRO-1, 2 or 3, with offload to the CPU if memory is short."
            )


def param_groups(zero: Any) -> list[list[nn.Parameter]]:
    """The model's trainable parameters, by group of the basic optimizer and in its order."""
    if hasattr(zero, "fp16_groups"):  # ZeRO-3 cuts each group into sub-groups
        groups: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
        for sub_group, parameters in enumerate(zero.fp16_groups):
            groups[zero.sub_group_to_group_id[sub_group]].extend(parameters)
        return groups
    found = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    return [list(group) for group in found]


def _release(removed_parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> None:
    """Free the dropped parameters: their storage, and what holds the objects.

    DeepSpeed binds methods to parameters, so that each holds itself, and ZeRO-3's autograd functions, which Python does
    not collect, keep the dropped modules alive: they are left without parameters.
    """
    for module in modules:
        for name in ("_parameters", "_original_parameters"):  # ZeRO-3 puts a dictionary of its own before torch's
            module.__dict__.get(name, {}).clear()
    for parameter in removed_parameters:
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        parameter.grad = None
        parameter.__dict__.clear()


def _empty_fetcher(zero: Any) -> None:
    """Empty what fetched ZeRO-3's parameters: autograd functions, which Python does not collect, hold it for good."""
    offload = zero.parameter_offload
    for holder in (offload.get_param_coordinator(), offload):
        holder.__dict__.clear()


def _forget_functions(modules: Sequence[nn.Module]) -> None:
    """Take ZeRO-3's autograd functions off the modules: they are bound to the old optimizer and would keep it alive."""
    for module in modules:
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)


def _forget_partitions(staying: Sequence[nn.Parameter]) -> None:
    """Take the old partition's marks off the parameters; what makes one a ZeRO-3 parameter (`ds_…`) stays."""
    for parameter in staying:
        for name in ("_hp_mapping", "_hp_grad", "grad_accum", "_z3_optimizer", "_zero_optimizer"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def _without_scheduler(config: Any) -> dict[str, Any]:
    """The config without a scheduler: the one that there is goes on counting."""
    settings: dict[str, Any] = copy.deepcopy(config)
    settings.pop("scheduler", None)
    return settings
