"""What a scan measures on a model without a unit: the loss, the accuracy on choices, or any `compute_metrics`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat

from ..surgery.adapters import base_of
from .calibration import CHOICE_COLUMNS, Batch, model_inputs

# The mean loss of a batch, as a tensor, and the number of labels (or examples) that it is the mean of.
Loss = Callable[[nn.Module, Batch], tuple[torch.Tensor, float]]


def model_output(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch."""
    return model(**model_inputs(batch))


@dataclass(frozen=True)
class Metric:
    """A measure of a model on the calibration set.

    Attributes:
        name: Its name.
        collect: The contribution of one batch, from the model, the result of `run` and the batch; in numbers or NumPy
            arrays, so that it can be sent between processes.
        finish: The measure, from the contributions of all batches of all processes.
        worse_is_greater: Whether a greater value is worse, as for a loss.
        check: Raises on a batch that cannot be measured.
        of_labels: Whether it depends only on the predictions at positions with labels.
        of_each_batch: Whether it is defined for a single batch, as a mean is.
        run: What is computed for a batch by calling the model; by default the model's output.
    """

    name: str
    collect: Callable[[nn.Module, Any, Batch], Any]
    finish: Callable[[Sequence[Any]], float]
    worse_is_greater: bool = True
    check: Callable[[nn.Module, Batch], None] = lambda model, batch: None
    of_labels: bool = False
    of_each_batch: bool = False
    run: Callable[[nn.Module, Batch], Any] = model_output

    def importance(self, value: float) -> float:
        """The importance of a unit, given the measure `value` without it: higher = more important."""
        return value if self.worse_is_greater else -value


# ---- the loss


def _add_loss(model: nn.Module, output: Any, batch: Batch) -> tuple[float, float]:
    tokens = num_label_tokens(model, batch)
    return (output.loss.item() * tokens if tokens else 0.0), tokens  # the mean over no labels is NaN


def _mean_loss(parts: Sequence[tuple[float, float]]) -> float:
    total, tokens = (sum(numbers) for numbers in zip(*parts, strict=True))
    if not tokens:
        raise ValueError(
            f"Expected calibration batches with labels, got {len(parts)} batches without any. Give examples whose labels "
            "are not all -100."
        )
    return float(total / tokens)


def num_label_tokens(model: nn.Module, batch: Batch) -> float:
    """The number of labels that the model's loss averages over.

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
    """The labels that the model's loss averages over, of shape (labels,)."""
    labels: torch.Tensor = batch["labels"]
    if is_causal(model):
        labels = labels[..., 1:]  # a causal model predicts each token but the first
    return labels[labels != -100]


def is_causal(model: nn.Module) -> bool:
    """Whether the model's labels are its own input, each predicted at the previous token."""
    return type(base_of(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _check_labels(model: nn.Module, batch: Batch) -> None:
    num_label_tokens(model, batch)


LOSS = Metric("loss", _add_loss, _mean_loss, check=_check_labels, of_labels=True, of_each_batch=True)


def own_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
    """The loss that the model itself computes."""
    return model_output(model, batch).loss, num_label_tokens(model, batch)


def from_loss(loss: Loss) -> Metric:
    """The metric "loss" for a loss that the model does not compute itself, such as a Trainer's `compute_loss`."""

    def collect(model: nn.Module, output: tuple[torch.Tensor, float], batch: Batch) -> tuple[float, float]:
        mean, count = output
        return (float(mean) * count if count else 0.0), count

    return Metric("loss", collect, _mean_loss, of_each_batch=True, run=loss)


# ---- accuracy on choices


def _add_choices(model: nn.Module, output: Any, batch: Batch) -> list[tuple[int, bool, float]]:
    """For each row: its question, whether its choice is right, and the choice's log-likelihood."""
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
        answered += [right for right, score in rows if score == best] == [True]  # a tie with a wrong choice does not count
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


Predictions = tuple[Any, Any, Any]  # loss, logits and labels, as returned by `Trainer.prediction_step`


def from_compute_metrics(
    name: str,
    compute_metrics: Callable[..., dict[str, float]],
    preprocess_logits: Callable[[Any, Any], Any] | None = None,
    greater_is_better: bool | None = None,
    *,
    predict: Callable[[nn.Module, Batch], Predictions] | None = None,
    inputs_of: Callable[[Batch], Any] | None = None,
    with_losses: bool = False,
    batch_by_batch: bool = False,
) -> Metric:
    """A metric from a Trainer's `compute_metrics`.

    Args:
        name: A key in the result of `compute_metrics`, with or without the prefix "eval_".
        compute_metrics: As for the Trainer.
        preprocess_logits: As the Trainer's `preprocess_logits_for_metrics`. What it returns is kept for each unit and
            each example until the end: for a language model take the argmax here.
        greater_is_better: None: true unless the name ends in "loss", as for `TrainingArguments.metric_for_best_model`.
        predict: As `Trainer.prediction_step`; by default the model's own loss and logits, and the batch's labels.
        inputs_of: Returns the inputs of a batch, if `compute_metrics` needs them (`include_for_metrics`).
        with_losses: Whether it needs a loss for each example (likewise).
        batch_by_batch: Whether it is called for each batch, with `compute_result=True` at the last (`batch_eval_metrics`).
    """
    bare = name.removeprefix("eval_")
    if greater_is_better is None:
        greater_is_better = not bare.endswith("loss")

    def collect(model: nn.Module, output: Predictions, batch: Batch) -> dict[str, Any]:
        loss, logits, labels = output
        kept = logits if preprocess_logits is None else preprocess_logits(logits, labels)
        part = {"predictions": kept, "label_ids": labels}
        if inputs_of is not None:
            part["inputs"] = inputs_of(batch)
        if with_losses:
            part["losses"] = loss.repeat(len(tree_leaves(kept)[0]))
        return {key: _to_numpy(value) for key, value in part.items() if value is not None}

    def finish(parts: Sequence[dict[str, Any]]) -> float:
        if batch_by_batch:
            for part in parts:  # the Trainer passes tensors here
                tensors = tree_map(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, part)
                found = compute_metrics(_as_evaluated(tensors), compute_result=part is parts[-1])
        else:
            joined = parts[0]
            for part in parts[1:]:
                joined = nested_concat(joined, part, padding_index=-100)
            found = compute_metrics(_as_evaluated(joined))
        named = {key.removeprefix("eval_"): value for key, value in found.items()}
        if bare not in named:
            raise ValueError(
                f"Expected compute_metrics to return {name!r}, got {sorted(found)}. Set scan_metric to one of these."
            )
        return float(named[bare])

    check = _check_labels if predict is None else Metric.check
    return Metric(name, collect, finish, not greater_is_better, check, run=predict or _own_predictions)


def _as_evaluated(part: dict[str, Any]) -> EvalPrediction:
    return EvalPrediction(**{"label_ids": None, **part})


def _own_predictions(model: nn.Module, batch: Batch) -> Predictions:
    output = model_output(model, batch)
    return output.get("loss"), output.logits, batch.get("labels")


METRICS = {metric.name: metric for metric in (LOSS, CHOICE_ACCURACY)}


def get_metric(metric: str | Metric) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: If it is not one of the metrics that need no user-defined function.
    """
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise ValueError(
            f"Expected a metric among {sorted(METRICS)}, got {metric!r}. For a key of what your compute_metrics returns "
            "give the function as well: to the Trainer, or as from_compute_metrics(key, compute_metrics)."
        )
    return METRICS[metric]


def exponential(metric: Metric) -> Metric:
    """The metric's exponential: for the mean loss, the perplexity."""
    return replace(metric, name="perplexity", finish=lambda parts: float(np.exp(metric.finish(parts))))


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    if isinstance(value, tuple | list):
        return type(value)(_to_numpy(item) for item in value)
    return value
