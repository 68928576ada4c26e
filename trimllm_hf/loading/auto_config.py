"""What `import trimllm_hf` registers with transformers: how to load what it cannot express, and the additions in `patches`.

Registration waits until the module in question is imported, because importing transformers' Auto classes takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .patches import follow_configs, follow_hotswap, follow_models, follow_peft_models, follow_tokenizers, follow_xlora

AUTO = "transformers.models.auto.configuration_auto"


def register_when_imported(kinds: Mapping[str, str]) -> None:
    """Register with AutoConfig and patch the modules: now where a module is already imported, else as soon as it is.

    Args:
        kinds: By model type, where the `CustomModel` of its models is: a module, a colon, and its name there.
    """
    wanted: dict[str, Callable[[ModuleType], None]] = {
        AUTO: lambda module: register(kinds),
        "transformers.configuration_utils": follow_configs,
        "transformers.modeling_utils": partial(follow_models, dict(kinds)),
        "transformers.tokenization_utils_base": follow_tokenizers,
        "peft.peft_model": follow_peft_models,
        "peft.utils.hotswap": follow_hotswap,
        "peft.tuners.xlora.model": follow_xlora,
    }
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder(wanted)
    sys.meta_path.insert(0, finder)
    for name in [name for name in wanted if name in sys.modules]:
        finder.told(sys.modules[name])


def register(kinds: Mapping[str, str]) -> None:
    """Register the model types with AutoConfig."""
    from transformers import AutoConfig

    for model_type, place in kinds.items():
        AutoConfig.register(model_type, _reader(model_type, place), exist_ok=True)


def _reader(kind: str, place: str) -> type[Any]:
    """A config class that reads a config.json of a model type and returns an instance of the architecture's own class."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    class CustomConfig(PreTrainedConfig):
        """Stands for one of this package's model types in AutoConfig."""

        model_type = kind

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            module, _, name = place.partition(":")
            custom = getattr(import_module(module), name)
            plain = custom.from_saved_config(config_dict)
            return custom.cast(CONFIG_MAPPING[plain["model_type"]].from_dict(plain, **kwargs))

    return CustomConfig


class _Finder(MetaPathFinder):
    """Finds no modules itself: it notices that a module is being imported, and runs the registered actions afterwards."""

    def __init__(self, wanted: dict[str, Callable[[ModuleType], None]]) -> None:
        self.wanted = wanted
        self.looking: set[str] = set()  # names being looked up by the other finders

    def told(self, module: ModuleType) -> None:
        """Run the actions for a module, once."""
        self.wanted.pop(module.__name__)(module)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.wanted or fullname in self.looking:
            return None
        self.looking.add(fullname)
        spec = find_spec(fullname)
        self.looking.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.told(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
