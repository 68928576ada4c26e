"""Repair: what stays in front of a gap takes over what it can of the layers that go, by a closed-form refit."""

from .fit import INFINITE, fit_repairs
from .gaps import Gap, places
from .output_projection import OutputProjection
from .repair import Refit, Repair

__all__ = ["INFINITE", "Gap", "OutputProjection", "Refit", "Repair", "fit_repairs", "places"]
