"""An audition: of a few sets of layers, those without which a model is the best on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..engines import ProcessGroup
from ..importance.calibration import Batch
from ..surgery.repair import Repair
from .repair import HELD_OUT, fit, loss_without


@dataclass(frozen=True)
class Audition:
    """What came of an audition.

    Attributes:
        winner: The name of the set that won.
        losses: The held-out loss of the model without the layers of each set, by the sets' names.
        repair: The winner's repair; where models were not repaired for it, one that changes nothing.
    """

    winner: str
    losses: Mapping[str, float]
    repair: Repair

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        return f"Chosen by {self.winner}. Held-out losses: {losses}."


def audition(
    model: nn.Module,
    sets: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    unit: str = "block",
    *,
    repaired: bool = True,
    part: str | None = None,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> Audition:
    """Compare a model without one or another set of layers, repaired: a repair changes which set is best.

    All repairs are fitted in one pass over the batches but one of eight, which judge. No weight changes.

    Args:
        model: A transformers model, unwrapped, with all its layers.
        sets: Positions of layers, by what chose them. Of equal losses the first wins.
        batches: This process's calibration batches.
        unit: "block" or "sublayer".
        repaired: Whether to repair for it; else the plain models are compared.
        part: Of an encoder-decoder, the stack that the layers are of.
        process_group: The processes of the run.
        filler_batch: A batch for a process whose share is empty; it does not count.

    Raises:
        ValueError: If there is no set, or nothing to judge by.
    """
    if not sets:
        raise ValueError("Expected at least one set of layers to compare, got none.")
    share = max(1, len(batches) // HELD_OUT)
    fitted, held_out = (list(batches[:-share]), list(batches[-share:])) if len(batches) > 1 else (batches, batches)
    how: dict[str, Any] = {"process_group": process_group, "filler_batch": filler_batch}
    unique = list(dict.fromkeys(tuple(sorted(layers)) for layers in sets.values()))
    repairs = fit(model, unique, fitted, unit, penalty=None if repaired else math.inf, part=part, **how)
    heard = {repair.layers: (loss_without(model, repair, held_out, **how), repair) for repair in repairs}
    of_each = {name: heard[tuple(sorted(layers))] for name, layers in sets.items()}
    losses = {name: loss for name, (loss, _) in of_each.items()}
    winner = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
    return Audition(winner, losses, of_each[winner][1])
