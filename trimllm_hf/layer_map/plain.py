"""Plain values from files that nobody vouches for: what they are, and how to show them in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_list_of(value: Any, test: Callable[[Any], Any]) -> TypeGuard[list[Any]]:
    """Whether a value is a list whose items all pass a test."""
    return isinstance(value, list | tuple) and all(test(item) for item in value)


def shown(value: Any) -> str:
    """A value for an error message, cut short: it may come from a hostile file."""
    text = repr(list(value) if isinstance(value, Iterable) and not isinstance(value, str | dict) else value)
    return text if len(text) <= 120 else text[:117] + "..."
