"""`DropRecord`: one drop of a map's history; and the checks that a map's fields share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..utils import is_count, is_list_of, is_number, shown


@dataclass(frozen=True)
class DropRecord:
    """One drop: at which optimizer step, which layers (base numbering), by which importance, with which scores.

    `sublayers` names for each of `dropped` what of it went, "attention" or "mlp"; None: whole blocks.
    """

    dropped: tuple[int, ...]
    step: int | None = None
    importance: str | None = None
    scores: tuple[float, ...] | None = None
    sublayers: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return plain if self.sublayers is not None else {key: plain[key] for key in plain if key != "sublayers"}

    @classmethod
    def from_dict(cls, plain: Any) -> DropRecord:
        """Read a record that `to_dict` wrote; nothing in it is trusted.

        Raises:
            ValueError: If it is damaged.
        """
        if isinstance(plain, dict) and "halves" in plain:  # as 0.1.0.dev0 called it
            plain = {"sublayers" if key == "halves" else key: value for key, value in plain.items()}
        if not isinstance(plain, dict) or not set(plain) <= {"dropped", "step", "importance", "scores", "sublayers"}:
            raise ValueError(
                f"Expected a history entry of dropped, step, importance, scores, sublayers, got {shown(plain)}."
            )
        dropped, step, scores, sublayers = (plain.get(key) for key in ("dropped", "step", "scores", "sublayers"))
        if not is_list_of(dropped, is_count) or not (step is None or is_count(step)):
            raise ValueError(f"Expected whole numbers in a history entry, got {shown(plain)}.")
        if not (scores is None or is_list_of(scores, is_number)):
            raise ValueError(f"Expected numbers as a history entry's scores, got {shown(plain)}.")
        if not isinstance(plain.get("importance"), str | None):
            raise ValueError(f"Expected text as a history entry's importance, got {shown(plain)}.")
        named = sublayers is None or (is_list_of(sublayers, lambda kind: kind in ("attention", "mlp")))
        if not named or (sublayers is not None and len(sublayers) != len(dropped)):
            raise ValueError(f"Expected 'attention' or 'mlp' for each of a history entry's layers, got {shown(plain)}.")
        return cls(
            tuple(dropped),
            step,
            plain.get("importance"),
            None if scores is None else tuple(float(score) for score in scores),
            None if sublayers is None else tuple(sublayers),
        )


def check_layers(name: str, layers: Any, base_num_layers: int, least: int = 1) -> None:
    """Refuse what is no ascending tuple of a base's layers.

    Raises:
        ValueError: Naming the field.
    """
    if not isinstance(layers, tuple) or len(layers) < least or not all(is_count(layer) for layer in layers):
        number = ", at least one" if least else ""
        raise ValueError(f"Expected {name} to be whole numbers{number}, got {shown(layers)}.")
    if any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"Expected {name} in ascending order without repeats, got {shown(layers)}.")
    if layers and layers[-1] >= base_num_layers:
        raise ValueError(
            f"Expected {name} from 0 to {base_num_layers - 1} (the base has {base_num_layers} layers), got {shown(layers)}."
        )


def check_positions(layers: Sequence[int], number: int) -> None:
    """Refuse positions that cannot be dropped from a model with so many layers.

    Raises:
        ValueError: If one is out of range or named twice, or if none or all are named.
    """
    if not layers:
        raise ValueError(f"Expected at least one layer to drop, got none. The model has {number}.")
    wrong = [layer for layer in layers if not is_count(layer) or layer >= number]
    if wrong:
        raise ValueError(f"Expected layers from 0 to {number - 1} (the model has {number} now), got {shown(wrong)}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"Expected each layer once, got {shown(layers)}.")
    if len(layers) == number:
        raise ValueError(f"Expected at least one layer to stay, got all {number} to drop.")


def check_sublayers(kept: tuple[int, ...], attention: Any, mlp: Any, base_num_layers: int) -> None:
    """Refuse kept attentions and MLPs that are not, together, the kept layers.

    Raises:
        ValueError: Naming the field.
    """
    for name, layers in (("kept_attention", attention), ("kept_mlp", mlp)):
        check_layers(name, layers, base_num_layers, least=0)
    if set(kept) != {*attention, *mlp}:
        raise ValueError(
            "Expected kept_layers to be the layers in kept_attention or kept_mlp, got "
            f"{shown(kept)}, {shown(attention)} and {shown(mlp)}."
        )
