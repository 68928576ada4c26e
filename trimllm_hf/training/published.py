"""TrimLLM's original procedure (Hu, Rosing, Zhang, arXiv 2412.11242), as settings."""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, Any] = {
    "unit": "sublayer",  # §3: an attention or an MLP
    "importance": "sensitivity",  # §3.2: the accuracy without it, on a calibration set
    "scan_metric": "choice_accuracy",
    "tie_breaker": "activation_norm",  # for equal accuracies
    "warm_up_importance": "none",
    "drop_every": "spread",  # one at a time, to the end of the run
    "healing_ratio": 0.0,
    "layers_per_drop": 1,
    "rescore": True,
    "repair": "none",
}
