"""Repair: compensates for dropped layers by a closed-form refit of a weight in the last layer before each gap."""

from .fit import INFINITE, fit_repairs
from .gaps import Gap, places
from .output_projection import OutputProjection
from .repair import Refit, Repair

__all__ = ["INFINITE", "Gap", "OutputProjection", "Refit", "Repair", "fit_repairs", "places"]
