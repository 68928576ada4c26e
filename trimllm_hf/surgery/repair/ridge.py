"""A refit's change of weight, from its sums."""

from __future__ import annotations

import math

import torch


def solve(gram: torch.Tensor, cross: torch.Tensor, penalty: float) -> torch.Tensor | None:
    """The change of weight (G + penalty D)^-1 C, in float64, where D is the mean of G's diagonal; None if there is none.

    G is the sum of a^T a, and C that of a^T R, R what the dropped layers add. As a new weight that is
    W^T <- (G + penalty D)^-1 (C' + penalty D W^T), with C' that of a^T (R + a W^T). An infinite penalty gives 0.

    Args:
        gram: G, of shape (features, features).
        cross: C, of shape (features, width).
        penalty: Weight of the old weight, as a share of the features' mean square; above 0.
    """
    if math.isinf(penalty):
        return torch.zeros_like(cross)
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
