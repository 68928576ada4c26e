"""Ridge regression from sums: a refit's weight change, and the choice of the penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Sums:
    """Sums over tokens, in float64.

    Attributes:
        gram: G, the sum of a^T a, of shape (features, features).
        cross: C, the sum of a^T R, with R the regression target, of shape (features, width).
    """

    gram: torch.Tensor
    cross: torch.Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.cross + other.cross)


def solve(sums: Sums, penalty: float) -> torch.Tensor | None:
    """The weight change (G + penalty D)^-1 C, where D is the mean of G's diagonal; None if there is no solution.

    In terms of the new weight: W^T <- (G + penalty D)^-1 (C' + penalty D W^T), with C' the sum of a^T (R + a W^T).

    Args:
        sums: G and C.
        penalty: Strength of the pull towards the old weight, relative to the features' mean square; above 0.
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
    """The penalty whose change, solved from some tokens, has the lowest error on other tokens.

    The squared error of a change X on the others is tr(X^T G X) - 2 tr(X^T C) + const, with G and C their sums.

    Args:
        fitted: The sums to solve from.
        held_out: The sums of other tokens.
        penalties: The values to choose from. The first is returned on ties, or if none has a solution.
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
