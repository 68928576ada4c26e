"""Settings as plain values and in JSON files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self


class JsonSettings:
    """A dataclass whose values can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)  # type: ignore[call-overload]  # of a dataclass

    def to_json(self, path: str | Path) -> None:
        """Write the settings to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read the settings from a JSON file.

        Raises:
            TypeError: If the file names a setting that does not exist.
            ValueError: If a value is out of range.
        """
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
