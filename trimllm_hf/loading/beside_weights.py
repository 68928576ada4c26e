"""A base's files other than weights that are copied along: tokenizer, processors, templates, code, licence, and more."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from .base_files import BaseFiles

# Written anew, or belonging to weights, to a run, to other formats, or to the base alone.
_LEFT_OUT = (
    *("*.index.json", "*.index.*.json", "*.safetensors", "*.gguf", "*.onnx*", "*.h5"),
    *("*.msgpack", "*.tflite", "*.mlmodel", "*.ot", "*.distcp"),
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz"),
    *("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "events.out.*", "zero_to_fp32.py", "latest"),
    *("README*", "trim_report.json", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", ".gitattributes"),
)
_FOLDERS_LEFT_OUT = (".*", "checkpoint-*", "global_step*", "runs", "onnx", "openvino", "original", "__pycache__")
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def copy_beside_weights(files: BaseFiles, folder: Path, with_code: bool) -> list[str]:
    """Copy a base's files that are neither weights nor written by a training run. Pickles are never copied.

    Args:
        files: The base.
        folder: The destination; files already written there are kept.
        with_code: Whether its Python files are needed.

    Returns:
        What was not copied; folders end with a slash.
    """
    left_out: list[str] = []
    names = list(_names(files))
    modules = _modules(files) if "modules.json" in names else []
    for name in names:
        path = PurePosixPath(name)
        outer = next((part for part in path.parts[:-1] if any(fnmatch(part, each) for each in _FOLDERS_LEFT_OUT)), None)
        if outer is not None:
            left_out.append(f"{outer}/")
            continue
        of_module = path.suffix == ".safetensors" and path.parent.as_posix() in modules
        if name == "config.json":
            continue
        wanted = of_module or not any(fnmatch(path.name, pattern) for pattern in _LEFT_OUT)
        wanted = wanted and (with_code or path.suffix != ".py")
        found = files.find(name) if wanted else None
        if found is None or _is_pickle(found):
            left_out.append(name)
        elif not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, folder / name)
    own = {path.name for path in folder.iterdir()}
    return [name for name in dict.fromkeys(left_out) if name not in own]


def _names(files: BaseFiles) -> Iterable[str]:
    """The names of all files of a base, in its folder or on the Hub; offline, those in the cache."""
    subfolder = files.hub.get("subfolder") or ""
    if not Path(files.base).is_dir():
        try:
            listed = HfApi(token=files.hub.get("token")).list_repo_files(str(files.base), revision=files.hub.get("revision"))
            inside = f"{subfolder}/" if subfolder else ""
            return [name.removeprefix(inside) for name in sorted(listed) if name.startswith(inside)]
        except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
            pass
    config = files.find("config.json")
    if config is None:
        return []
    root = config.parent
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _modules(files: BaseFiles) -> list[str]:
    """The folders of the modules that Sentence Transformers adds around a model, which may have weights of their own."""
    found = files.find("modules.json")
    try:
        listed = json.loads(found.read_text(encoding="utf-8")) if found is not None else []
        return [str(module["path"]) for module in listed if module.get("path")]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _is_pickle(path: Path) -> bool:
    """Whether a file's contents are a pickle, whatever its name."""
    with path.open("rb") as opened:
        if opened.read(2) in _PICKLE:
            return True
    return zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
