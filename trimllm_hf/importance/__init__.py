"""Importance: a number for each layer, higher = keep. A registry of plain functions, by name.

A score is a mean over tokens (or examples). Each function returns its *totals* over the batches that it was given and the
number of tokens, so that processes with shares of different size agree on the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..calibration import Batch, own_randomness
from .rules import last, random
from .scan import sensitivity
from .statistics import block_influence

Importance = Callable[[nn.Module, Sequence[Batch], str], tuple[torch.Tensor, float]]

_REGISTRY: dict[str, Importance] = {
    "sensitivity": sensitivity,
    "block_influence": block_influence,
    "last": last,
    "random": random,
}
_WITHOUT_DATA = {"last", "random"}


def register_importance(name: str, function: Importance) -> None:
    """Make a score of your own usable as `TrimConfig(importance=name)`.

    Args:
        name: The name; one that is taken is refused.
        function: Takes the model (in evaluation mode, no gradients), the batches (dicts of tensors on the model's
            device) and the unit; returns the totals, a tensor of shape (layers,), and the count by which to divide the
            sum of the totals of all processes. Higher = more important.

    Raises:
        ValueError: If the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"Expected a new name for an importance, got {name!r}, which exists. Choose another.")
    _REGISTRY[name] = function


def get_importance(name: str) -> Importance:
    """The score of that name.

    Raises:
        ValueError: If there is none; lists those that there are.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Expected an importance among {sorted(_REGISTRY)}, got {name!r}. Add it: register_importance.")
    return _REGISTRY[name]


def needs_data(name: str) -> bool:
    """Whether the score looks at calibration examples at all.

    Raises:
        ValueError: If there is no score of that name.
    """
    get_importance(name)
    return name not in _WITHOUT_DATA


def score_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    importance: str = "sensitivity",
    unit: str = "block",
    *,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Score every layer of a model on calibration batches.

    Args:
        model: A transformers model, unwrapped.
        batches: Dicts of model inputs, moved to the model's device here; with labels, where the score needs a loss.
        importance: Name of the score.
        unit: "block".
        agree: Sums a tensor over all processes; None in one process.
        seed: For scores that draw. Global random state is left as it was.

    Returns:
        Scores of shape (layers,), float64 on the CPU, the same on every process. Higher = more important.

    Raises:
        ValueError: If the name is unknown, there is nothing to score on, or a score is not a number.
    """
    function = get_importance(importance)
    device = next(model.parameters()).device
    with own_randomness(seed), _evaluating(model), torch.no_grad():
        totals, count = function(model, [send_to_device(batch, device) for batch in batches], unit)
    both = torch.cat([totals.double().cpu(), torch.tensor([count], dtype=torch.float64)]).to(_reducible(device))
    if agree is not None:
        both = agree(both)
    both = both.cpu()
    if both[-1] <= 0:
        raise ValueError(
            f"Expected calibration batches with tokens to score by {importance!r}, got {len(batches)} batches without "
            "any. Give examples whose labels are not all -100."
        )
    scores = both[:-1] / both[-1]
    if not torch.isfinite(scores).all():
        wrong = [position for position, score in enumerate(scores.tolist()) if not torch.isfinite(torch.tensor(score))]
        raise ValueError(
            f"Expected finite scores, got {scores[wrong[0]].item()} by {importance!r} for the layers {wrong}. The loss "
            "has diverged, or the calibration set holds an example that the model cannot score."
        )
    return scores


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _reducible(device: torch.device) -> Any:
    return device if device.type == "cuda" else torch.device("cpu")
