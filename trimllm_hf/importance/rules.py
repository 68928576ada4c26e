"""Scores that do not look at the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..calibration import Batch
from .sublayers import num_units


def last(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """The deeper, the less important: the top layers go first ("Why Lift so Heavy?", arXiv 2402.11700)."""
    return torch.arange(num_units(model, unit), 0, -1, dtype=torch.float64), 1.0


def random(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """Uniform noise, by the seed of the scoring: the baseline that a score has to beat."""
    return torch.rand(num_units(model, unit), dtype=torch.float64), 1.0
