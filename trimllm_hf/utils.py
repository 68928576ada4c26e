"""What several rooms need: isolated random state, values from untrusted JSON, sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_list_of(value: Any, test: Callable[[Any], Any]) -> TypeGuard[list[Any]]:
    """Whether a value is a list whose items all pass a test."""
    return isinstance(value, list | tuple) and all(test(item) for item in value)


def as_list(value: Any) -> list[Any]:
    """A list as a list, None as an empty one, and anything else as a list of one: what YAML and Trainers let users write."""
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]


def shown(value: Any) -> str:
    """A value for an error message, cut short: it may come from a hostile file."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a number of more than 100 digits"  # Python refuses to print one of 5,000
    text = repr(list(value) if isinstance(value, Iterable) and not isinstance(value, str | dict) else value)
    return text if len(text) <= 120 else text[:117] + "..."


def fields_of(plain: Any, what: str, version: int) -> dict[str, Any]:
    """The fields of a versioned dict from an untrusted file, without its version.

    Args:
        plain: What stands in the file.
        what: What it should be, for the error.
        version: The version that can be read.

    Raises:
        ValueError: If it is no dict, or of another version.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"Expected {what} (a dict), got {shown(plain)}.")
    fields = dict(plain)
    found = fields.pop("version", None)
    if found != version or isinstance(found, bool):
        raise ValueError(f"Expected {what} of version {version}, got {shown(found)}. Install a newer trimllm_hf.")
    return fields


def refuse_other_keys(fields: dict[str, Any], known: set[str], needed: str) -> None:
    """Refuse fields of other names, or without the one that is needed.

    Raises:
        ValueError: Naming those that are known.
    """
    if not set(fields) <= known or needed not in fields:
        raise ValueError(f"Expected the keys {sorted(known)}, got {shown(sorted(map(str, fields)))}.")


def refuse_not_text(**fields: Any) -> None:
    """Refuse values that are neither text nor None.

    Raises:
        ValueError: Naming the field.
    """
    for name, value in fields.items():
        if not isinstance(value, str | None):
            raise ValueError(f"Expected {name} to be text or null, got {shown(value)}.")


def json_at(file: Path, *path: str) -> Any:
    """What stands at `path` in a JSON file, or None where the file or the path does not exist.

    Raises:
        ValueError: If the file is no JSON.
    """
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected JSON in {file}, got: {error}. A save was not finished: save again, or use an earlier checkpoint."
        ) from None
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


@contextmanager
def _fork_other_devices() -> Iterator[None]:
    """What `fork_rng` does for CPU and CUDA, for devices of Intel (XPU) and Apple (MPS)."""
    restore: list[Callable[[], None]] = []
    if torch.xpu.is_available():
        for number in range(torch.xpu.device_count()):
            restore.append(partial(torch.xpu.set_rng_state, torch.xpu.get_rng_state(number), number))
    if torch.backends.mps.is_available():
        restore.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for each in restore:
            each()


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Run a block with generators of its own: what training draws afterwards is what it would have drawn without."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), _fork_other_devices():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode; every module's own mode afterwards as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    for module, _ in modes:
        # bitsandbytes packs 4-bit weights anew for evaluation on a CPU, and does not train on rightly with them (0.50)
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def quantizer_of(config: Any) -> str | None:
    """What quantized the weights that a config describes, or None where they are not quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")[:100]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file only names a large one, as a clone without Git LFS leaves it."""
    with path.open("rb") as opened:
        return opened.read(23) == b"version https://git-lfs"


def checksum(path: Path, large: bool) -> str:
    """A file's checksum as the Hub tells it: git's of a small file, sha256 of a large one. Once per state of the file."""
    status = path.stat()
    return _checksum(path, large, status.st_size, status.st_mtime_ns)


@cache
def _checksum(path: Path, large: bool, size: int, changed: int) -> str:
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def format_bytes(size: float | None) -> str:
    """A size for a person, in powers of 1000: 1.50 GB."""
    if size is None:
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} bytes"
