"""The plugin for Axolotl: with the installed Axolotl's base class, else with one that has its methods."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainingArguments

from trimllm_hf import LayerMap

pytest.importorskip("pydantic", reason="pydantic is not installed")
MODULE = "trimllm_hf.training.axolotl"


class BasePlugin:
    """What of Axolotl 0.19's class a plugin may override, as far as this one does: each does nothing."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    yield module.TrimPlugin()
    sys.modules.pop(MODULE, None)


def test_the_plugin_overrides_only_methods_that_axolotl_calls(plugin: Any) -> None:
    base = type(plugin).__mro__[1]
    own = {name for name, value in vars(type(plugin)).items() if callable(value)}
    assert own == {"register", "get_input_args", "add_callbacks_pre_trainer"} and own <= vars(base).keys()


def test_a_config_of_axolotl_may_hold_the_settings(plugin: Any) -> None:
    """Axolotl imports the class by this name, and mixes it into its own config's."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(trim={"target_ratio": 0.5}).trim == {"target_ratio": 0.5}
    assert arguments().trim is None


def test_the_callback_trims(plugin: Any, tmp_path: Path) -> None:
    config = {"trim": {"target_layers": 4, "importance": "last", "drop_every": "2"}}
    plugin.register(config)
    model = tiny_model()
    arguments = TrainingArguments(str(tmp_path), max_steps=8, report_to="none", use_cpu=True, save_strategy="no")
    callbacks = plugin.add_callbacks_pre_trainer(cfg=config, model=model)
    Trainer(model, arguments, train_dataset=tiny_texts(), callbacks=callbacks).train()
    assert len(LayerMap.from_config(model.config).kept_layers) == 4


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({}, ValueError, "Expected a section trim in the config, e.g. `trim: {target_ratio: 0.5}`, got none"),
        ({"trim": None}, ValueError, "Expected a section trim"),
        ({"trim": {"target_ratio": 2}}, ValueError, "target_ratio above 0 and below 1"),
        ({"trim": {"target": 2}}, TypeError, "target"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    plugin: Any, config: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        plugin.register(config)
