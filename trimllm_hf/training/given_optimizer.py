"""Updates an optimizer that a script created for the full-depth model, when a resumed run first drops layers from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Trainer

from ..engines.parameter_groups import remove_from_optimizer


@contextmanager
def optimizer_follows(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Remove parameters dropped within the `with` block from the optimizer and the groups passed to the Trainer as well."""
    before = list(model.parameters())
    yield
    stay = {id(parameter) for parameter in model.parameters()}
    gone = [parameter for parameter in before if id(parameter) not in stay]
    if not gone:
        return
    if trainer.optimizer is not None:
        schedulers = [] if trainer.lr_scheduler is None else [trainer.lr_scheduler]
        remove_from_optimizer(trainer.optimizer, gone, schedulers)
    made: Any = trainer.optimizer_cls_and_kwargs
    if made is not None and isinstance(made[1].get("params"), list):
        made[1]["params"] = _without(made[1]["params"], {id(parameter) for parameter in gone})


def _without(groups: list[Any], gone: set[int]) -> list[Any]:
    """Parameters, or groups of them, without some; a group that becomes empty is removed."""
    if not groups or not isinstance(groups[0], dict):
        return [each for each in groups if id(_parameter(each)) not in gone]
    found = [{**group, "params": list(group["params"])} for group in groups]
    left = [{**group, "params": _without(group["params"], gone)} for group in found]
    return [after for before, after in zip(found, left, strict=True) if after["params"] or not before["params"]]


def _parameter(each: Any) -> Any:
    return each[1] if isinstance(each, tuple) else each  # given as (name, parameter)
