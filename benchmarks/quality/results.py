"""What was measured: one file of JSON Lines for a base, one line for a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

Result = dict[str, Any]
Key = tuple[str, str, int, int, int]  # domain, method, blocks that were asked for, seed, steps


def key_of(result: Result) -> Key:
    """Which run it was. A model of sublayers has all of its blocks: `target` says how deep it is counted.

    At a constant rate a longer run holds the shorter ones, and replaces them.
    """
    steps = 0 if result.get("constant") else result["steps"]
    return result["domain"], result["method"], result["target"], result["seed"], steps


def read(file: Path) -> dict[Key, Result]:
    """All runs of a base; of two of the same kind the later."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {key_of(result): result for result in map(json.loads, lines)}


def add(file: Path, result: Result) -> None:
    """Write a run down, while others may do the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        write(file, [*read(file).values(), result])


def write(file: Path, results: Iterable[Result]) -> None:
    """Write runs in the order of their keys, one of each: so that a new one is one new line."""
    found = {key_of(result): result for result in results}
    lines = [json.dumps(found[key], ensure_ascii=False) + "\n" for key in sorted(found)]
    file.write_text("".join(lines), encoding="utf-8")
