"""The stop rule on a metric: dropping stops when it has cost more than allowed, and the last model that passed is kept.

Before each drop, and at the last step, the model is evaluated. The reference is the metric of the full-depth model: given,
or what the last evaluation before the first drop says. With a given one the first drop waits until the run has come close
enough to it. From the first drop on, each evaluation is judged, the user's own ones too: one that is worse than the
reference by more than `max_metric_drop` stops all further dropping. Training goes on, so that a model that fails may heal
and pass in the end; the run ends with the last model that passed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from .config import TrimConfig
from .schedule import Plan, last_step, layers_due

logger = logging.get_logger("transformers.trimllm_hf")

PASSING = "_passing-"  # not pushed with a Trainer's output_dir, which leaves out what begins with an underscore


@dataclass
class MetricStop:
    """Where a run stands with its stop rule; goes into trainer_state.json.

    Attributes:
        reference: The metric at full depth, once it is known.
        started_at: Optimizer step of the first drop.
        judged_at: Optimizer step of the last evaluation that was judged.
        passes: Whether it passed.
        stopped_at: Optimizer step at which an evaluation failed after a drop.
        passed: The last evaluation that passed and whose model was kept: its step, metric, folder and kept-layer map.
    """

    reference: float | None = None
    started_at: int | None = None
    judged_at: int | None = None
    passes: bool = False
    stopped_at: int | None = None
    passed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def watched_metric(config: TrimConfig, args: TrainingArguments) -> tuple[str, bool]:
    """The metric that `max_metric_drop` watches, without "eval_", and whether higher is better."""
    of_args = (args.metric_for_best_model or "loss").removeprefix("eval_")
    name = (config.stop_metric or of_args).removeprefix("eval_")
    if name == of_args and args.metric_for_best_model is not None and args.greater_is_better is not None:
        return name, args.greater_is_better
    return name, not name.endswith("loss")


def read_metric(metrics: dict[str, float], name: str, others_follow: bool) -> float | None:
    """The watched metric among those of an evaluation.

    Args:
        metrics: What the Trainer's evaluation returned.
        name: Its name without "eval_".
        others_follow: Whether another evaluation may have it: a Trainer evaluates several data sets one by one.

    Raises:
        ValueError: If it is not there.
    """
    if f"eval_{name}" in metrics:
        return float(metrics[f"eval_{name}"])
    if others_follow or not any(key.startswith("eval_") for key in metrics):
        return None
    raise ValueError(
        f"Expected the metric {name!r} (stop_metric) among those of the evaluation, got "
        f"{sorted(key.removeprefix('eval_') for key in metrics if key.startswith('eval_'))}. Name one of them, or let "
        "compute_metrics return it."
    )


def bar(config: TrimConfig, reference: float, greater_is_better: bool) -> float:
    """The worst metric that passes."""
    assert config.max_metric_drop is not None
    return reference - config.max_metric_drop if greater_is_better else reference + config.max_metric_drop


def judge(stop: MetricStop, config: TrimConfig, value: float, step: int, greater_is_better: bool) -> None:
    """Judge an evaluation at a step: note the reference, whether it passes, and whether dropping stops.

    Raises:
        ValueError: If the reference would not be a number.
    """
    if config.reference_metric is not None:
        stop.reference = config.reference_metric
    elif stop.started_at is None:
        if not math.isfinite(value):
            raise ValueError(
                f"Expected a number for the reference at full depth, got {value} at step {step}. The run has diverged, or "
                "the metric is not defined on the evaluation set."
            )
        stop.reference = value
    assert stop.reference is not None  # dropping starts with an evaluation that passes
    limit = bar(config, stop.reference, greater_is_better)
    stop.judged_at, stop.passes = step, bool(value >= limit if greater_is_better else value <= limit)
    if stop.started_at is not None and not stop.passes and stop.stopped_at is None:
        stop.stopped_at = step
        logger.warning(
            f"Step {step}: no more layers are dropped. The metric is {value:.6g}, and with max_metric_drop="
            f"{config.max_metric_drop:g} of the reference {stop.reference:.6g} it may be {limit:.6g} at "
            f"{'least' if greater_is_better else 'most'}. Unless it heals, the run ends with the model of step "
            f"{stop.passed['step'] if stop.passed else None}."
        )


def due_under(stop: MetricStop, config: TrimConfig, plan: Plan, step: int, dropped: int, max_steps: int) -> int:
    """As `layers_due`, where the plan begins when the full-depth model passes, and dropping may have stopped."""
    if stop.stopped_at is not None or not plan or step > last_step(config, max_steps):
        return 0
    first = min(plan)
    if stop.started_at is None:
        return layers_due(plan, min(step, first), dropped)
    return layers_due(plan, step - (stop.started_at - first), dropped)


def must_evaluate(stop: MetricStop, plan: Plan, due: int, step: int, max_steps: int) -> bool:
    """Whether the model has to be evaluated after this step, whatever the Trainer's own schedule says.

    While the first drop waits, at the steps of the plan; then before each drop; and at the end.
    """
    if step >= max_steps:
        return stop.started_at is not None
    return due > 0 and (stop.started_at is not None or step in plan)


def passing_folder(output_dir: str | Path, step: int) -> Path:
    """Where the model that passed after a step is kept."""
    return Path(output_dir) / f"{PASSING}{step}"


def forget_others(output_dir: str | Path, kept: Sequence[str | Path]) -> None:
    """Remove the models that passed, but for those named."""
    names = {Path(folder).name for folder in kept}
    for folder in Path(output_dir).glob(f"{PASSING}*"):
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)
