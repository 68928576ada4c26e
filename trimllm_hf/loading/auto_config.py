"""The AutoConfig patch: `import trimllm_hf` makes the Auto classes load models that lack sublayers.

It is made when transformers' Auto classes are imported, which takes seconds, and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register with AutoConfig: now, if transformers' Auto classes are there, else as soon as they are."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Tell AutoConfig of the model type."""
    from transformers import AutoConfig, PreTrainedConfig

    from ..layer_map import MODEL_TYPE

    class TrimmedConfig(PreTrainedConfig):
        """Reads a config.json whose `model_type` is ours; what comes out is of the architecture's own class."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            from transformers import CONFIG_MAPPING

            from ..surgery.sublayers import from_saved_config, with_trimmed_class

            plain = from_saved_config(config_dict)
            return with_trimmed_class(CONFIG_MAPPING[plain["model_type"]].from_dict(plain, **kwargs))

    AutoConfig.register(MODEL_TYPE, TrimmedConfig, exist_ok=True)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it sees that the module is being imported, and lets `register` run behind it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
