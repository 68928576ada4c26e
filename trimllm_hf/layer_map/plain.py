"""Plain values from files that nobody vouches for: what they are, and how to show them in an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_list_of(value: Any, test: Callable[[Any], Any]) -> TypeGuard[list[Any]]:
    """Whether a value is a list whose items all pass a test."""
    return isinstance(value, list | tuple) and all(test(item) for item in value)


def shown(value: Any) -> str:
    """A value for an error message, cut short: it may come from a hostile file."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a number of more than 100 digits"  # Python refuses to print one of 5,000
    text = repr(list(value) if isinstance(value, Iterable) and not isinstance(value, str | dict) else value)
    return text if len(text) <= 120 else text[:117] + "..."


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
        raise ValueError(f"Expected JSON in {file}, got: {error}. It is half written: use another checkpoint.") from None
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found
