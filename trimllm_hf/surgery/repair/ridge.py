"""Ridge regression from sums: a refit's change of weight, and how much to hold the old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Sums:
    """Sums over tokens, in float64.

    Attributes:
        gram: G, the sum of a^T a, of shape (features, features).
        cross: C, the sum of a^T R, R what is to be explained, of shape (features, width).
    """

    gram: torch.Tensor
    cross: torch.Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.cross + other.cross)


def solve(sums: Sums, penalty: float) -> torch.Tensor | None:
    """The change of weight (G + penalty D)^-1 C, where D is the mean of G's diagonal; None if there is no solution.

    As a new weight that is W^T <- (G + penalty D)^-1 (C' + penalty D W^T), with C' the sum of a^T (R + a W^T).

    Args:
        sums: G and C.
        penalty: Weight of the old weight, as a share of the features' mean square; above 0.
    """
    gram, cross = sums.gram, sums.cross
    if gram.device.type == "mps":
        gram, cross = gram.cpu(), cross.cpu()
    mean = gram.diagonal().mean()
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all() and mean > 0):
        return None
    held = gram.clone()
    held.diagonal().add_(penalty * mean)
    factor, info = torch.linalg.cholesky_ex(held)
    if info.item():
        return None
    change = torch.cholesky_solve(cross, factor)
    return change if torch.isfinite(change).all() else None


def best_penalty(fitted: Sums, held_out: Sums, penalties: Sequence[float]) -> float:
    """The penalty whose change, solved from some tokens, explains most of what others lack.

    With the change X its squared error on the others is tr(X^T G X) - 2 tr(X^T C) + const, of their sums.

    Args:
        fitted: The sums to solve from.
        held_out: Those of other tokens.
        penalties: What to choose from. Of equal ones the first wins, and where nothing can be solved.
    """
    errors = []
    for penalty in penalties:
        change = solve(fitted, penalty)
        if change is None:
            errors.append(float("inf"))
            continue
        change = change.to(held_out.gram.device)
        errors.append(float((change * (held_out.gram @ change - 2 * held_out.cross)).sum()))
    return penalties[errors.index(min(errors))]
