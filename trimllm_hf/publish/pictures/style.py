"""What the pictures have in common: colours, axes, files that are the same for the same data."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The colours, and the variables of a page that stand for them, so that its pictures follow light and dark.
COLOURS = {"#1f5f99": "--kept", "#e9ecef": "--dropped", "#343a40": "--ink", "#c92a2a": "--mark"}
KEPT, DROPPED, INK, MARK = COLOURS


def dress(axes: Any, x: str, y: str) -> None:
    """Name the axes, and take away what shows nothing."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=DROPPED, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def refuse_no_matplotlib() -> None:
    """Refuse to draw without the library that draws.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("Expected matplotlib for the figures, got none. pip install 'trimllm_hf[plot]'")


def save(figure: Any, path: Path) -> None:
    """As the file's name says, PNG or SVG; nothing in it tells of the program's version or the time."""
    anonymous: dict[str, None] = {"Software": None} if path.suffix != ".svg" else {"Creator": None, "Date": None}
    figure.savefig(path, dpi=150, metadata=anonymous)
