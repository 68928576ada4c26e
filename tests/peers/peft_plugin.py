"""A plugin for pytest that runs PEFT's own tests on the models of `peft_models.py`: see `run_peft.py`, which loads it.

The mode says which: `in_memory`, where each model loses layers as soon as it is loaded; `reloaded`, trimmed folders; and
`untrimmed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peers_log import models, modes, switches

MARK = "drop_once_loaded"


def pytest_configure(config: pytest.Config) -> None:
    from tests import testing_utils

    testing_utils.hub_online_once = never_online
    switches.append(take_models_of)
    follow_loads()
    without_network()


def take_models_of(mode: str) -> None:
    """Point the cache of the Hub to that of a mode."""
    cache = Path(os.environ["HF_HUB_CACHE"])
    cache.unlink(missing_ok=True)
    cache.symlink_to(mode)


@contextmanager
def never_online(model_id: str) -> Iterator[None]:
    yield


def follow_loads() -> None:
    from transformers import PreTrainedModel

    plainly = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = plainly(cls, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        wanted = None
        for module in model.modules():  # some hold a config of their own
            if hasattr(config := getattr(module, "config", None), MARK):
                wanted = getattr(config, MARK)
                delattr(config, MARK)
        if modes.mode == "in_memory" and wanted and getattr(model.config, "trim", None) is None:  # a save keeps base's words
            from trimllm_hf import drop_layers

            models["trimmed"] += 1  # also if it is refused
            drop_layers(model, wanted["layers"], part=wanted["part"] if model.config.is_encoder_decoder else None)
        elif getattr(model.config, "trim", None) is not None:
            models["trimmed"] += 1
        return found

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def without_network() -> None:
    """What PEFT's tests take from elsewhere: some quotations; and a newer PEFT, which transformers 5.24 asks for."""
    import datasets
    from transformers.integrations import peft as integration

    integration.MIN_PEFT_VERSION = "0.21.0"
    quotes = [f"This is the quotation number {number}, of a dog and a tree." for number in range(32)]
    plainly = datasets.load_dataset

    def load_dataset(name: Any, *args: Any, **kwargs: Any) -> Any:
        if "quotes" not in str(name):
            return plainly(name, *args, **kwargs)
        columns = {"quote": quotes, "author": ["x"] * len(quotes), "tags": [["a"]] * len(quotes)}
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))

    datasets.load_dataset = load_dataset
