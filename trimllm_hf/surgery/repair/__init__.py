"""Repair: what stays in front of a gap takes over what it can of the layers that go, by a closed-form refit."""

from .fit import PENALTY, fit_repairs
from .gaps import Gap
from .output_projection import OutputProjection
from .repair import Refit, Repair

__all__ = ["PENALTY", "Gap", "OutputProjection", "Refit", "Repair", "fit_repairs"]
