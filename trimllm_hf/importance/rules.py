"""Scores that depend only on a layer's position, or on nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..surgery.units import list_units
from .calibration import Batch


def last(model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None) -> tuple[torch.Tensor, float]:
    """The deeper, the less important: the top layers are dropped first ("Why Lift so Heavy?", arXiv 2402.11700)."""
    return torch.arange(len(list_units(model, unit, part)), 0, -1, dtype=torch.float64), 1.0


def deepest_except_last(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None
) -> tuple[torch.Tensor, float]:
    """As `last`, but the last layer is kept: the "simple" rule of Gromov et al. (arXiv 2403.17887, §4.4)."""
    scores, count = last(model, batches, unit, part)
    positions = [candidate.position for candidate in list_units(model, unit, part)]
    at_end = [position == max(positions) for position in positions]
    return scores + len(scores) * torch.tensor(at_end), count


def first(model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None) -> tuple[torch.Tensor, float]:
    """The deeper, the more important: the bottom layers are dropped first. A baseline that a score must beat by far."""
    return torch.arange(len(list_units(model, unit, part)), dtype=torch.float64), 1.0


def random(model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None) -> tuple[torch.Tensor, float]:
    """Uniform noise, drawn with the seed of the scoring: the baseline that a score must beat."""
    return torch.rand(len(list_units(model, unit, part)), dtype=torch.float64), 1.0
