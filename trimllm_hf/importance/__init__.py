"""Importance: one score per layer, higher = keep; the scores by name, the scan, and the calibration set."""

from .evaluation import evaluate_metric
from .metrics import METRICS, Metric, from_compute_metrics, get_metric
from .per_ms import per_ms
from .scores import (
    Importance,
    goes_by_loss,
    is_joint,
    known,
    needs_data,
    refuse_not_per_ms,
    register_importance,
    score_layers,
)
from .spread import standard_error

__all__ = [
    "METRICS",
    "Importance",
    "Metric",
    "evaluate_metric",
    "from_compute_metrics",
    "get_metric",
    "goes_by_loss",
    "is_joint",
    "known",
    "needs_data",
    "per_ms",
    "refuse_not_per_ms",
    "register_importance",
    "score_layers",
    "standard_error",
]
