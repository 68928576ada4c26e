"""A sliced model's widths on its card: in words, as a row of bars, and as a picture's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = {"hidden_size": "hidden states", "intermediate_size": "MLP channels"}


@dataclass(frozen=True)
class Widths:
    """The width of each layer.

    Attributes:
        full: The width of every layer of the base.
        kept: The width of each layer of the model.
        of: "hidden states", or "MLP channels".
        by: How the shares were allocated.
    """

    full: int
    kept: tuple[int, ...]
    of: str
    by: str

    @property
    def cut(self) -> float:
        """The mean share that was cut."""
        return 1 - sum(self.kept) / (len(self.kept) * self.full)

    def __str__(self) -> str:
        """In words: `6 layers with 19 to 32 of 32 hidden states (25.0% cut in the mean, by redundancy)`."""
        low, high = min(self.kept), max(self.kept)
        sizes = str(high) if low == high else f"{low} to {high}"
        return (
            f"{len(self.kept)} layers with {sizes} of {self.full} {self.of} ({self.cut:.1%} cut in the mean, by {self.by})"
        )


def widths_of(slicing: dict[str, Any] | None) -> Widths | None:
    """The widths in the `config.slicing` of a loaded config; None for a model that is not sliced."""
    if slicing is None:
        return None
    (field,) = (name for name in FIELDS if name in slicing)
    layers = slicing["per_layer_config"]
    kept = tuple(int(layers[str(layer)][field]) for layer in range(len(layers)))
    by = slicing["allocation"]
    return Widths(slicing[field], kept, FIELDS[field], by if by == "uniform" else f"{by}, spread {slicing['spread']:g}")


def text_widths(full: int, kept: Sequence[int]) -> str:
    """One character per layer, its height being the width that is left: █ all of it, ▁ an eighth."""
    return "".join("▁▂▃▄▅▆▇█"[max(0, -(-8 * width // full) - 1)] for width in kept)
