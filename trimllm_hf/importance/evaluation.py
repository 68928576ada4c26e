"""Runs a model for scoring, and restores its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedConfig

from ..engines import ProcessGroup, SingleProcess
from ..utils import evaluating, isolated_rng
from .calibration import Batch
from .metrics import Metric, get_metric


@contextmanager
def to_be_scored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled code, plain outputs."""
    # a stance takes effect when it is created, not when it is entered, so it is created in the with statement
    with torch.compiler.set_stance("force_eager"), evaluating([model]), _plain_outputs(model), torch.no_grad():
        yield


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """No cache, which would mix the candidates, and no load-balancing loss, which is unrelated to the answer."""
    names = ("use_cache", "output_router_logits", "_output_attentions", "output_hidden_states")
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if isinstance(config, PreTrainedConfig)]
    configs += [config.get_text_config(decoder=True) for config in configs]
    unique = {id(config): config for config in configs}.values()
    had = [(config, name, vars(config)[name]) for config in unique for name in names if name in vars(config)]
    try:
        for config, name, _ in had:
            vars(config)[name] = False
        yield
    finally:
        for config, name, value in had:
            vars(config)[name] = value


def evaluate_metric(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: str | Metric = "loss",
    *,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> float:
    """Evaluate a metric of the unchanged model on calibration batches; see `score_layers` for the arguments.

    Raises:
        ValueError: If there are no batches to measure on.
    """
    found = get_metric(metric)
    return found.finish(collect_metric(model, batches, found, process_group, filler_batch))


def collect_metric(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> list[Any]:
    """The contributions of each batch of each process to a metric of the unchanged model, the same on every process."""
    process_group = process_group or SingleProcess()
    padded = on_every_process(model, list(batches), metric.name, process_group, filler_batch)
    with isolated_rng(0), to_be_scored(model), process_group.heard(model):
        for batch in padded:
            metric.check(model, batch)
        parts = [metric.collect(model, metric.run(model, batch), batch) for batch in padded]
    return [part for process in process_group.gather(parts[: len(batches)]) for part in process]


def on_every_process(
    model: nn.Module, batches: list[Batch], what: str, process_group: ProcessGroup, filler_batch: Batch | None
) -> list[Batch]:
    """The batches on the model's device, the same number on every process.

    A process with fewer batches repeats its last one, without counting it: the forward pass of a sharded model is
    collective.
    """
    empty = next((found for batch in batches if (found := _empty_input(model, batch))), None)
    shares = process_group.gather((len(batches), filler_batch is not None, empty))
    passes = max(share for share, *_ in shares)
    for *_, empty in shares:
        if empty is not None:
            raise ValueError(
                f"Expected calibration batches with tokens to score by {what!r}, got one whose {empty}. Leave out examples "
                "without any."
            )
    if passes == 0 or not all(share or stands_in for share, stands_in, _ in shares):
        raise ValueError(
            f"Expected calibration batches on every process to score by {what!r}, got none on at least one. Give more "
            "calibration examples, or a filler_batch."
        )
    spare = [batches[-1] if batches else filler_batch] * (passes - len(batches))
    return [send_to_device(batch, next(model.parameters()).device) for batch in batches + spare]


def _empty_input(model: nn.Module, batch: Batch) -> str | None:
    """Which of a batch's inputs holds nothing, in words; None if a forward pass has something to compute."""
    if not isinstance(batch, Mapping):  # whatever the given loss accepts
        return None
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", getattr(model, "main_input_name", "input_ids")):
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            return f"{name} have the shape {tuple(value.shape)}"
    return None
