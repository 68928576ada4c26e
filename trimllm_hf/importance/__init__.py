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
from ..layer_map import LayerMap
from .agreement import Agree, least_and_most, on_any
from .rules import last, random
from .scan import Measure, ScanSettings, scan, sensitivity, token_loss
from .statistics import block_influence

Importance = Callable[[nn.Module, Sequence[Batch], str], tuple[torch.Tensor, float]]

_REGISTRY: dict[str, Importance] = {
    "sensitivity": sensitivity,
    "block_influence": block_influence,
    "last": last,
    "random": random,
}
_WITHOUT_DATA = {"last", "random"}
_MEASURES: dict[str, Measure] = {"sensitivity": token_loss}  # what a scan of that name measures


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
    agree: Agree | None = None,
    seed: int = 0,
    memory_gb: float | None = None,
    sweep: bool = True,
    stand_in: Batch | None = None,
    progress: bool = False,
    part: str | None = None,
) -> torch.Tensor:
    """Score every layer of a model on calibration batches.

    Args:
        model: A transformers model, unwrapped.
        batches: Dicts of model inputs, moved to the model's device here; with labels, where the score needs a loss.
        importance: Name of the score.
        unit: "block"; or "sublayer": a score for each attention and each MLP, in the order of `LayerMap.sublayers`
            (attention, then MLP of each block; 2n for a base of n blocks).
        agree: Sums a tensor over all processes; None in one process.
        seed: For scores that draw. Global random state is left as it was.
        memory_gb: For a scan: memory for its candidates, in 10^9 bytes, beside that of a forward pass. None: half of
            what is free.
        sweep: For a scan: whether one pass may score several layers. False where each call of a block is a matter of all
            processes (ZeRO-3), which may make different numbers of them in a sweep.
        stand_in: A batch for the forward passes of a process whose share is empty; it does not count.
        progress: For a scan: whether to show a bar with the candidates scored.
        part: Of an encoder-decoder, whose layers to score: "decoder" or "encoder"; see `drop_layers`.

    Returns:
        Scores of shape (layers,), or (sublayers,), float64 on the CPU, the same on every process. Higher = more important.

    Raises:
        ValueError: If the name is unknown, there is nothing to score on, or a score is not a number.
    """
    get_importance(importance)
    device = next(model.parameters()).device
    agreed = _on_device(agree, device)
    batches = list(batches)
    passes = 1
    if needs_data(importance):
        _, passes = least_and_most(agreed, len(batches))
        idle = not batches and stand_in is None
        if passes == 0 or on_any(agreed, idle):
            raise ValueError(
                f"Expected calibration batches on every process to score by {importance!r}, got none on at least one. "
                "Give more calibration examples, or a stand_in."
            )
    settings = ScanSettings(memory_gb, agreed, sweep, progress)
    # a process with a smaller share goes through its last batch again, for nothing: forward passes of a sharded model
    # are a matter of all processes
    spare = [batches[-1] if batches else stand_in] * (passes - len(batches))
    padded = [send_to_device(batch, device) for batch in batches + spare]
    sums: torch.Tensor | None = None
    wrong: list[str] = []
    with (
        own_randomness(seed),
        _evaluating(model),
        _of_part(model, part),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        for number, (totals, count) in enumerate(_by_batch(importance, model, padded, unit, settings)):
            both = torch.cat([totals.double().cpu(), torch.tensor([count], dtype=torch.float64)])
            if number >= len(batches) and needs_data(importance):
                both = torch.zeros_like(both)  # a pass for the others' sake
            sums = both if sums is None else sums + both
            if number < len(batches):
                bad = (~torch.isfinite(totals)).nonzero().flatten().tolist()
                wrong += [f"layers {bad} in batch {number}"] if bad else []
    assert sums is not None  # there is one pass at least
    sums = agreed(sums)
    if sums[-1] <= 0:
        raise ValueError(
            f"Expected calibration batches with tokens to score by {importance!r}, got {len(batches)} batches without "
            "any. Give examples whose labels are not all -100."
        )
    scores = sums[:-1] / sums[-1]
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"Expected finite scores by {importance!r}, got {scores.tolist()}: not finite for "
            f"{'; '.join(wrong) or 'batches of another process'}. The loss has diverged, or the calibration set holds an "
            "example that the model cannot score."
        )
    return scores


def _by_batch(
    name: str, model: nn.Module, batches: Sequence[Batch], unit: str, settings: ScanSettings
) -> Iterator[tuple[torch.Tensor, float]]:
    """The score's totals and count, batch after batch."""
    if name in _MEASURES:
        return scan(model, batches, _MEASURES[name], settings, unit)
    function = get_importance(name)
    if not needs_data(name):
        return iter([function(model, [], unit)])
    return (function(model, [batch], unit) for batch in batches)


def _on_device(agree: Agree | None, device: torch.device) -> Agree:
    """Sums over the processes on the device that their backend takes; tensors come from the CPU and go back to it."""
    if agree is None:
        return lambda total: total
    return lambda total: agree(total.to(device if device.type == "cuda" else "cpu")).cpu()


@contextmanager
def _of_part(model: nn.Module, part: str | None) -> Iterator[None]:
    """Name the part in the model's map, from which every score takes it; without a map, in one for the time being."""
    config: Any = model.config
    missing = part is not None and getattr(config, "trim", None) is None
    layer_map = LayerMap.from_config(config, part)  # raises where the part does not fit
    if missing:
        config.trim = layer_map.to_dict()
    try:
        yield
    finally:
        if missing:
            del config.trim


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
