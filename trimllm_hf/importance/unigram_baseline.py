"""Whether a model has learned anything about the labels yet: otherwise a scan ranks noise.

The baseline is the loss of a model that knows only the frequency of each label, estimated from other examples. For a
classifier the labels are the classes, for a language model the tokens (a unigram model). A loss above 95% of that baseline
is at chance level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..engines import ProcessGroup, SingleProcess
from ..surgery.adapters import base_of
from .calibration import Batch
from .evaluation import evaluate_metric
from .metrics import labels_of

LEFT_CHANCE = 0.95  # share of the baseline below which a model has learned something


def loss_at_unigram_baseline(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> tuple[float, float] | None:
    """The model's loss and the baseline, if the loss is at chance level; None if it is not, or if that is unknown.

    It is known for labels that are classes or tokens, and for regression (where the baseline is the labels' variance).

    Args:
        model: The unwrapped model.
        batches: This process's calibration batches.
        process_group: The processes of the run; None in one process. All get the same answer.
        filler_batch: A batch for the forward passes of a process whose share is empty.
    """
    process_group = process_group or SingleProcess()
    base = base_of(model)
    labels = [labels_of(base, batch).cpu() if batch.get("labels") is not None else None for batch in batches]
    everyones = process_group.gather(
        [None if found is None else (found.is_floating_point(), found.tolist()) for found in labels]
    )
    parts = [part for process in everyones for part in process]
    if not parts or None in parts or not any(values for _, values in parts):
        return None
    bar = _bar(base, any(floats for floats, _ in parts), [value for _, values in parts for value in values])
    if bar is None:
        return None
    loss = evaluate_metric(model, batches, process_group=process_group, filler_batch=filler_batch)
    return (loss, bar) if loss > LEFT_CHANCE * bar else None


def frequency_loss(labels: Sequence[Any], classes: int) -> float:
    """The mean loss of a model that knows only the frequency of each label, estimated from the other labels.

    Each label is predicted by its share among the others. The labels that occur once estimate the probability of unseen ones
    (Good, Biometrika 1953), which is spread evenly over all classes.

    Args:
        labels: Classes or tokens, at least one.
        classes: Number of classes.
    """
    counts, total = Counter(labels), len(labels)
    unseen = sum(count == 1 for count in counts.values()) / total
    loss = 0.0
    for count in counts.values():
        among_others = (1 - unseen) * (count - 1) / (total - 1) if count > 1 else 0.0
        loss -= count / total * math.log(among_others + unseen / classes)
    return min(loss, math.log(classes))


def _bar(base: Any, floats: bool, labels: list[Any]) -> float | None:
    kind = type(base).__name__
    if floats:
        single = kind.endswith("ForSequenceClassification") and base.config.num_labels == 1
        return torch.tensor(labels, dtype=torch.float64).var(correction=0).item() if single else None
    if kind.endswith("Classification"):
        return frequency_loss(labels, base.config.num_labels)
    if kind.endswith(("LM", "LMHeadModel", "ForConditionalGeneration")):
        return frequency_loss(labels, base.config.get_text_config(decoder=True).vocab_size)
    return None
