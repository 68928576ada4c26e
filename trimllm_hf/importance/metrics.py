"""What a scan measures of a model without a unit: the loss, the accuracy on choices, or any `compute_metrics`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat

from ..surgery.adapters import base_of
from .calibration import CHOICE_COLUMNS, Batch


@dataclass(frozen=True)
class Metric:
    """A measure of a model on the calibration set.

    Attributes:
        name: What it is called.
        collect: What one batch adds, from the model, its output and the batch; in numbers or NumPy arrays, to be sent
            between processes.
        finish: The measure, from what all batches of all processes have added.
        worse_is_greater: Whether a greater value is a worse one, as for a loss.
        check: Raises on a batch that cannot be measured.
        of_labels: Whether it depends only on what is predicted where there are labels.
    """

    name: str
    collect: Callable[[nn.Module, Any, Batch], Any]
    finish: Callable[[Sequence[Any]], float]
    worse_is_greater: bool = True
    check: Callable[[nn.Module, Batch], None] = lambda model, batch: None
    of_labels: bool = False

    def importance(self, value: float) -> float:
        """The importance of the unit without which the measure is `value`: higher = more important."""
        return value if self.worse_is_greater else -value


# ---- the loss


def _add_loss(model: nn.Module, output: Any, batch: Batch) -> tuple[float, float]:
    tokens = num_label_tokens(model, batch)
    return (output.loss.item() * tokens if tokens else 0.0), tokens  # the mean over no labels is not a number


def _mean_loss(parts: Sequence[tuple[float, float]]) -> float:
    total, tokens = (sum(numbers) for numbers in zip(*parts, strict=True))
    if not tokens:
        raise ValueError(
            f"Expected calibration batches with labels, got {len(parts)} batches without any. Give examples whose labels "
            "are not all -100."
        )
    return float(total / tokens)


def num_label_tokens(model: nn.Module, batch: Batch) -> float:
    """Number of labels that the model's mean loss is over.

    Raises:
        ValueError: If the batch has no labels.
    """
    if batch.get("labels") is None:
        raise ValueError(
            f"Expected calibration batches with labels, got only {sorted(batch)}. Use a collator that makes labels, or a "
            "score that needs none, like 'block_influence'."
        )
    return float(len(labels_of(model, batch)))


def labels_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The labels that the model's mean loss is over, of shape (labels,)."""
    labels: torch.Tensor = batch["labels"]
    if is_causal(model):
        labels = labels[..., 1:]  # a causal model predicts each token but the first
    return labels[labels != -100]


def is_causal(model: nn.Module) -> bool:
    """Whether the model's labels are its own input, each predicted at the token before it."""
    return type(base_of(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _check_labels(model: nn.Module, batch: Batch) -> None:
    num_label_tokens(model, batch)


LOSS = Metric("loss", _add_loss, _mean_loss, check=_check_labels, of_labels=True)


# ---- accuracy on choices


def _add_choices(model: nn.Module, output: Any, batch: Batch) -> list[tuple[int, bool, float]]:
    """For each row its question, whether its choice is right, and the choice's log-likelihood."""
    labels = batch["labels"][:, 1:]
    logits = output.logits[:, :-1].transpose(1, 2).float()
    losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    totals = -losses.sum(dim=1)
    if "per_token" in batch:
        totals = torch.where(batch["per_token"].bool(), totals / (labels != -100).sum(dim=1).clamp(min=1), totals)
    return list(zip(batch["question"].tolist(), batch["right"].bool().tolist(), totals.tolist(), strict=True))


def _choice_accuracy(parts: Sequence[list[tuple[int, bool, float]]]) -> float:
    choices: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for question, right, score in (row for part in parts for row in part):
        choices[question].append((right, score))
    answered = 0
    for question, rows in choices.items():
        if len(rows) < 2 or sum(right for right, _ in rows) != 1:
            raise ValueError(
                f"Expected at least two choices a question, one of them right, got {len(rows)} with "
                f"{sum(right for right, _ in rows)} right for question {question}. Give a calibration_dataset that holds "
                "all choices of each question, as QuestionEncoder.rows makes them."
            )
        if any(np.isnan(score) for _, score in rows):
            return float("nan")
        best = max(score for _, score in rows)
        answered += [right for right, score in rows if score == best] == [True]  # a tie with a wrong one is no answer
    return answered / len(choices)


def _check_choices(model: nn.Module, batch: Batch) -> None:
    missing = {"labels", "question", "right"} - set(batch)
    if missing:
        raise ValueError(
            f"Expected calibration batches with {sorted(CHOICE_COLUMNS)} for the metric 'choice_accuracy', got none of "
            f"{sorted(missing)}. Give a calibration_dataset of rows as QuestionEncoder.rows makes them."
        )


CHOICE_ACCURACY = Metric(
    "choice_accuracy", _add_choices, _choice_accuracy, worse_is_greater=False, check=_check_choices, of_labels=True
)


# ---- any compute_metrics


def from_compute_metrics(
    name: str,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    preprocess_logits: Callable[[Any, Any], Any] | None = None,
    greater_is_better: bool | None = None,
) -> Metric:
    """A metric of a Trainer's `compute_metrics`.

    Args:
        name: The key of what `compute_metrics` returns; "eval_" in front of it may be there or not.
        compute_metrics: As for the Trainer.
        preprocess_logits: As the Trainer's `preprocess_logits_for_metrics`. What it returns is kept for each unit and
            each example until the end: for a language model take the argmax here.
        greater_is_better: None: by the name, as for `TrainingArguments.metric_for_best_model`: unless it ends in "loss".
    """
    bare = name.removeprefix("eval_")
    if greater_is_better is None:
        greater_is_better = not bare.endswith("loss")

    def collect(model: nn.Module, output: Any, batch: Batch) -> tuple[Any, Any]:
        logits, labels = output.logits, batch.get("labels")
        kept = logits if preprocess_logits is None else preprocess_logits(logits, labels)
        return _to_numpy(kept), _to_numpy(labels)

    def finish(parts: Sequence[tuple[Any, Any]]) -> float:
        predictions, labels = parts[0]
        for more_predictions, more_labels in parts[1:]:
            predictions = nested_concat(predictions, more_predictions, padding_index=-100)
            labels = nested_concat(labels, more_labels, padding_index=-100)
        found = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        named = {key.removeprefix("eval_"): value for key, value in found.items()}
        if bare not in named:
            raise ValueError(
                f"Expected compute_metrics to return {name!r}, got {sorted(found)}. Set scan_metric to one of these."
            )
        return float(named[bare])

    return Metric(name, collect, finish, not greater_is_better, _check_labels)


def exponential(metric: Metric) -> Metric:
    """The metric's exponential: of the mean loss, the perplexity."""
    return replace(metric, name="perplexity", finish=lambda parts: float(np.exp(metric.finish(parts))))


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    if isinstance(value, tuple | list):
        return type(value)(_to_numpy(item) for item in value)
    return value
