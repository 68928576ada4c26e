"""An optimizer's groups of parameters, and what a learning-rate scheduler keeps for each of them, when parameters leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

# What torch's and transformers' schedulers keep for each group; other lists of theirs are about steps.
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
OF_STEPS = ("_milestones", "_schedulers", "_schedule_phases")


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def remove_from_optimizer(
    optimizer: Any, removed_parameters: Sequence[nn.Parameter], schedulers: Sequence[Any] | None = None
) -> None:
    """Take parameters out of an optimizer's groups and state, in place.

    A group that ends up empty leaves as well, also what its schedulers keep for it, so that optimizer and scheduler are
    those of the smaller model: a script that makes a group for each layer makes as many when it resumes. It stays, empty,
    where the schedulers are not known, or are none of torch's and transformers'.

    Args:
        optimizer: The optimizer, or Accelerate's wrapper around it.
        removed_parameters: The parameters that leave.
        schedulers: All that step its learning rates; None: not known.
    """
    optimizer = torch_optimizer(optimizer)
    gone = {id(parameter) for parameter in removed_parameters}
    emptied = []
    for number, group in enumerate(optimizer.param_groups):
        stay = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        if group["params"] and not stay:
            emptied.append(number)
        for key in ("param_names", "params"):  # torch keeps names beside parameters that were given with names
            if key in group:
                group[key][:] = [group[key][i] for i in stay]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]
    if schedulers is not None and len(emptied) < len(optimizer.param_groups):
        _remove_groups(optimizer, emptied, [each for scheduler in schedulers for each in _all_in(scheduler)])


def _remove_groups(optimizer: Any, numbers: Sequence[int], schedulers: Sequence[Any]) -> None:
    total = len(optimizer.param_groups)
    if any(_keeps_something_else(scheduler, total) for scheduler in schedulers):
        return
    kept = {id(values): values for scheduler in schedulers for values in _per_group(scheduler, total)}  # some share a list
    for values in [optimizer.param_groups, *kept.values()]:
        for number in reversed(numbers):
            del values[number]


def _all_in(scheduler: Any) -> Iterator[Any]:
    """A scheduler without Accelerate's wrapper, and those that it is made of."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _all_in(inner)


def _per_group(scheduler: Any, total: int) -> list[list[Any]]:
    lists = [vars(scheduler).get(name) for name in PER_GROUP]
    return [values for values in lists if isinstance(values, list) and len(values) == total]


def _keeps_something_else(scheduler: Any, total: int) -> bool:
    """Whether a scheduler may keep something for each group that is not known."""
    return any(
        isinstance(value, list | tuple) and len(value) == total and not (name in OF_STEPS or _is_known(name, value))
        for name, value in vars(scheduler).items()
    )


def _is_known(name: str, value: Any) -> bool:
    return name in PER_GROUP and isinstance(value, list)
