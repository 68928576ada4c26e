"""DistributedDataParallel: besides the optimizer, the gradient buckets have to be made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .engine import Changes, Engine, RemovedParameters
from .local import add_whole, refuse_hidden_parameters
from .parameter_groups import remove_from_optimizer
from .process_group import DistributedProcesses, ProcessGroup

T = TypeVar("T")

# Hooks that a user registered on the wrapper, and how they are called; they outlive the new buckets.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


class DDPEngine(DistributedProcesses, Engine):
    """A model in DistributedDataParallel; see `engines.Engine`."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Any = None) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise ValueError(
                f"Expected the model as accelerator.prepare returned it (DistributedDataParallel), got "
                f"{type(model).__name__}. Pass the wrapped model."
            )
        refuse_hidden_parameters(optimizer)
        self.wrapper = model
        self.optimizer = optimizer
        self.ddp_handler = getattr(accelerator, "ddp_handler", None)
        super().__init__(model.process_group)

    def edit(self, edit: Callable[[], T], removed_parameters: RemovedParameters) -> T:
        """Run `edit`, mend the optimizer, and give the wrapper new gradient buckets."""
        gone = removed_parameters()
        result = edit()
        remove_from_optimizer(self.optimizer, gone, self.schedulers)
        self._rebuild_buckets()
        return result

    def add(self, changes: Changes) -> None:
        """Each process adds the same to its own copy."""
        add_whole(changes)

    @classmethod
    @contextmanager
    def unprepared(cls, accelerator: Any, model: nn.Module) -> Iterator[ProcessGroup]:
        """Each process has the whole model."""
        yield DistributedProcesses()

    def _rebuild_buckets(self) -> None:
        """Build a new DDP around the same module and give its insides to the wrapper that everybody holds.

        The old Reducer must be freed first: its destructor takes its hooks off the parameters' gradient accumulators.
        """
        wrapper = self.wrapper
        options: dict[str, Any] = {
            "device_ids": wrapper.device_ids,
            "output_device": wrapper.output_device,
            "process_group": wrapper.process_group,
            "find_unused_parameters": wrapper.find_unused_parameters,
            "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
            "static_graph": wrapper.static_graph,
            "init_sync": False,  # the processes' parameters are equal, and comparing them copies all of them
        }
        if self.ddp_handler is not None:
            options = {**self.ddp_handler.to_kwargs(), **options}
        old = dict(wrapper.__dict__)
        for name in ("reducer", "logger"):
            del wrapper.__dict__[name], old[name]
        new = DistributedDataParallel(wrapper.module, **options)
        if self.ddp_handler is not None:
            self.ddp_handler.register_comm_hook(new)
        wrapper.__dict__.update(new.__dict__)
        wrapper.__dict__.update({name: old[name] for name in _HOOKS if name in old})
        wrapper.training = old["training"]
