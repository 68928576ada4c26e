"""What `import trimllm_hf` tells transformers: how to load what it cannot express, and how to write a trimmed config.

It is made when transformers' Auto classes are imported, which takes seconds, and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_when_imported(kinds: Mapping[str, str]) -> None:
    """Register with AutoConfig: now, if transformers' Auto classes are there, else as soon as they are.

    Args:
        kinds: By model type, where the `CustomModel` of its models is: a module, a colon, and its name there.
    """
    if AUTO in sys.modules:
        register(kinds)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(kinds))


def register(kinds: Mapping[str, str]) -> None:
    """Tell AutoConfig of the model types."""
    from transformers import AutoConfig

    for model_type, place in kinds.items():
        AutoConfig.register(model_type, _reader(model_type, place), exist_ok=True)
    write_older_spellings()


def _reader(kind: str, place: str) -> type[Any]:
    """A config class that reads a config.json of a model type; what comes out is of the architecture's own class."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    class CustomConfig(PreTrainedConfig):
        """Stands for a model type of ours in AutoConfig."""

        model_type = kind

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            module, _, name = place.partition(":")
            custom = getattr(import_module(module), name)
            plain = custom.from_saved_config(config_dict)
            return custom.cast(CONFIG_MAPPING[plain["model_type"]].from_dict(plain, **kwargs))

    return CustomConfig


def write_older_spellings() -> None:
    """Make the configs of trimmed models write older spellings beside the new ones.

    transformers has no seam where a config becomes a file, and an attribute of one config would not outlive a reload: so
    the method that all of them share is followed. Configs of models that are not trimmed are written as ever.
    """
    from transformers import PreTrainedConfig

    plainly = PreTrainedConfig.to_json_file
    if getattr(plainly, "writes_older_spellings", False):
        return

    @wraps(plainly)
    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        plainly(self, json_file_path, use_diff)
        if getattr(self, "trim", None) is not None:
            from ..surgery.older_spellings import add_to

            add_to(json_file_path, self)

    to_json_file.writes_older_spellings = True  # type: ignore[attr-defined]
    PreTrainedConfig.to_json_file = to_json_file  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    """Finds nothing itself: it sees that the module is being imported, and lets `register` run behind it."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds

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
            register(self.kinds)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
