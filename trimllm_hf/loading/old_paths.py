"""Module names that the documentation of 0.1.0.dev0 used, importable for one version with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# old module -> new module, and the names that changed in it
MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "trimllm_hf.stack": ("trimllm_hf.surgery.blocks", {"find_stack": "find_blocks"}),
    "trimllm_hf.publish.run": ("trimllm_hf.training.run_summary", {}),
}


def keep_old_paths() -> None:
    """Make the old module names importable."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())


class _OldPaths(MetaPathFinder, Loader):
    """Finds a module by its old name and fills it with the contents of the new one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        path, renamed = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is {path} now, and the old name will go with the next version. Import from there.",
            DeprecationWarning,
            stacklevel=2,
        )
        new = vars(import_module(path))
        vars(module).update({name: value for name, value in new.items() if not name.startswith("__")})
        vars(module).update({old: new[name] for old, name in renamed.items()})
