"""Access to a repository on the Hub: calls that are retried, and the files that it holds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from ..utils import checksum

logger = logging.get_logger("transformers.trimllm_hf")

T = TypeVar("T")
# Seconds between attempts, half a minute in total.
WAITS: tuple[float, ...] = (1, 2, 4, 8, 16)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# Old weights, which from_pretrained could load in place of this model's, and what the Trainer pickles.
STALE = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
STALE_TOO = ("adapter_config.json", "training_args.bin")


def transient(error: Exception) -> bool:
    """Whether the same call may succeed later: the network failed or the server is busy, rather than a refusal.

    The client raises OSError, RuntimeError (Xet), httpx's errors, and json's where a proxy answers in HTML.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT
    if isinstance(error, json.JSONDecodeError):
        return True
    if isinstance(error, ValueError):
        return False
    of_httpx = any(base.__module__.partition(".")[0] in ("httpx", "httpx2") for base in type(error).__mro__)
    return of_httpx or isinstance(error, OSError | RuntimeError)


def retried(call: Callable[[], T], what: str) -> T:
    """Call a function, and retry after transient errors; huggingface_hub does so only for some of its calls.

    Raises:
        Exception: The last attempt's error.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not transient(error):
                raise
            logger.warning(f"{what}: {brief(error)} Trying again in {wait:g} s.")
            time.sleep(wait)
    raise AssertionError  # the last wait is None


def brief(error: Exception) -> str:
    """The first lines of an error, with the reason that the Hub gives."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"
    if isinstance(error, HfHubHTTPError) and error.server_message and error.server_message not in text:
        text += f" ({error.server_message})"
    return text[:400].rstrip(".") + "."


@dataclass(frozen=True)
class Difference:
    """What separates a repository from a folder: files to send, and old weights to delete."""

    changed: tuple[str, ...]
    stale: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.stale)


def difference(folder: Path, files: Mapping[str, int], held: Mapping[str, RepoFile]) -> Difference:
    """Compare a folder's files with a repository's by size and checksum.

    Args:
        folder: The folder.
        files: The sizes of its files that are published, by path.
        held: The repository's files, by path.
    """
    changed = [name for name, size in files.items() if name not in held or not _same(folder / name, size, held[name])]
    stale = [
        name
        for name in held
        if name not in files and "/" not in name and any(Path(name).match(p) for p in (*STALE, *STALE_TOO))
    ]
    return Difference(tuple(changed), tuple(stale))


def _same(path: Path, size: int, held: RepoFile) -> bool:
    if size != held.size:
        return False
    return checksum(path, held.lfs is not None) == (held.blob_id if held.lfs is None else held.lfs.sha256)


def files_at(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a repository at a commit or reference, by path."""
    tree = retried(
        lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)), f"Listing the files of {repo_id}"
    )
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def head_of(api: HfApi, repo_id: str, revision: str) -> str:
    """The commit that a branch of a repository stands at."""
    info = retried(lambda: api.repo_info(repo_id, revision=revision), f"Asking for {repo_id}")
    if info.sha is None:
        raise ValueError(f"Expected {repo_id} to have a commit at {revision}, got none.")
    return info.sha
