"""The stop rule on a metric: dropping stops when the metric gets worse than allowed, and the last passing model is kept.

The model is evaluated before each drop and at the last step. The reference is the metric of the full-depth model: given, or
from the last evaluation before the first drop. With a given reference, the first drop waits until the run has come close
enough to it. From the first drop on, every evaluation counts, including the user's own: one that is worse than the
reference by more than `max_metric_drop` stops all further dropping. Training continues, so that a failing model may heal
and pass in the end; the run ends with the last model that passed.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..engines import Engine
from ..layer_map import LayerMap
from ..surgery.adapters import adapters_of, base_of
from .config import TrimConfig
from .nodes import refuse_unshared_folder
from .schedule import Plan, last_step
from .trainer_hooks import save_model, unwrapped

logger = logging.get_logger("transformers.trimllm_hf")

PASSING = "_passing-"  # a Trainer's push of its output_dir skips names that begin with an underscore


@dataclass
class StopState:
    """The state of the rule in a run, stored in trainer_state.json.

    Attributes:
        reference: The metric at full depth, once it is known.
        started_at: Optimizer step of the first drop.
        judged_at: Optimizer step of the last evaluation that was checked.
        passes: Whether it passed.
        stopped_at: Optimizer step at which an evaluation failed after a drop.
        passed: The last evaluation that passed and whose model was kept: its step, metric and kept-layer map.
    """

    reference: float | None = None
    started_at: int | None = None
    judged_at: int | None = None
    passes: bool = False
    stopped_at: int | None = None
    passed: dict[str, Any] | None = None


class MetricRule:
    """`max_metric_drop` in a run: what to evaluate, when to drop, and what the run ends with.

    Args:
        config: The settings.
        trainer: The Trainer, prepared.
        engine: How the processes agree.
        plan: When to drop how many layers.
        stop_state: The state of the rule; for a resumed run, from its checkpoint.

    Raises:
        ValueError: If the run could not be evaluated, or could not go back to a model that passed.
    """

    def __init__(self, config: TrimConfig, trainer: Trainer, engine: Engine, plan: Plan, stop_state: StopState) -> None:
        self.config, self.trainer, self.engine, self.plan = config, trainer, engine, plan
        self.name, self.greater_is_better = watched_metric(config, trainer.args)
        self.stop_state = stop_state
        refuse_what_cannot_end(trainer, engine)
        refuse_unshared_folder(engine, self.folder(0).parent)
        passed = self._named = self.stop_state.passed  # from the resumed checkpoint
        if passed is not None and not self.folder(passed["step"]).is_dir():
            raise ValueError(
                f"Expected the model that had passed by this checkpoint in {self.folder(passed['step'])}, got no such "
                "folder. Resume from the newest checkpoint, or put the folder back."
            )

    def folder(self, step: int) -> Path:
        """The folder of the model that passed after a step."""
        return Path(self.trainer.args.output_dir or ".") / f"{PASSING}{step}"

    def is_open(self, step: int) -> bool:
        """Whether layers may still be dropped: no evaluation has failed, and there is time left to heal."""
        return self.stop_state.stopped_at is None and step <= last_step(self.config, self._max_steps)

    def plan_step(self, step: int) -> int:
        """The step in the plan for a step of the run: the plan begins when the full-depth model passes."""
        first, started = min(self.plan, default=0), self.stop_state.started_at
        return min(step, first) if started is None else step - (started - first)

    def must_evaluate(self, step: int, due: int) -> bool:
        """Whether to evaluate after this step, regardless of the Trainer's own schedule.

        While the first drop is pending, at the steps of the plan; then before each drop; and at the end.
        """
        started = self.stop_state.started_at is not None
        return (started and step >= self._max_steps) or (due > 0 and (started or step in self.plan))

    def allows(self, step: int) -> bool:
        """Whether the model after this step has been evaluated and has passed."""
        return self.stop_state.judged_at == step and self.stop_state.passes

    def evaluated(self, metrics: dict[str, float], step: int, layer_map: LayerMap, due: bool) -> None:
        """Check an evaluation; keep the model if it passes and dropping has begun or is about to."""
        value = read_metric(metrics, self.name, isinstance(self.trainer.eval_dataset, dict))
        if value is None:
            return
        everyones = torch.tensor([value], dtype=torch.float64)  # compute_metrics runs on each process
        value = self.engine.all_reduce(everyones).item() / self.engine.world_size
        judge(self.stop_state, self.config, value, step, self.greater_is_better)
        if not self.stop_state.passes or not (due or self.stop_state.started_at is not None):
            return
        save_model(self.trainer, str(self.folder(step)))
        self.stop_state.passed = {"step": step, "metric": value, "layer_map": layer_map.to_dict()}
        self.tidy()

    def dropped(self, step: int) -> None:
        """Record a drop."""
        if self.stop_state.started_at is None:
            self.stop_state.started_at = step

    def saved(self) -> None:
        """Record that a checkpoint is complete: from now on only the model that it names may be restored."""
        self._named = self.stop_state.passed
        self.tidy()

    def tidy(self) -> None:
        """Remove the models that passed, except for the last one and the one that the last checkpoint names."""
        kept = {self.folder(passed["step"]) for passed in (self.stop_state.passed, self._named) if passed is not None}
        if self.trainer.args.should_save and kept:
            for folder in self.folder(0).parent.glob(f"{PASSING}*"):
                if folder not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def passed_instead(self, step: int) -> tuple[Path, LayerMap, int] | None:
        """Folder, map and step of the model that the run must end with, if it is not that of its last step."""
        reference, passed = self.stop_state.reference, self.stop_state.passed
        if self.stop_state.started_at is None:
            told = "none" if reference is None else f"{reference:.6g}"
            logger.warning(
                f"No layer was dropped: no evaluation at full depth, up to the last step that leaves time to heal, came as "
                f"close to the reference ({told}) as max_metric_drop={self.config.max_metric_drop:g} asks for."
            )
        if self.stop_state.started_at is None or passed is None or passed["step"] == step:
            return None
        self.engine.all_reduce(torch.zeros(1))  # the main process has written the folder
        layer_map = LayerMap.from_dict(passed["layer_map"])
        logger.warning(
            f"The run ends with the model of step {passed['step']}, {layer_map.num_layers} layers, which is the last that "
            f"passed ({self.name} {passed['metric']:.6g})."
        )
        return self.folder(passed["step"]), layer_map, passed["step"]

    @property
    def _max_steps(self) -> int:
        return int(self.trainer.state.max_steps)


def refuse_what_cannot_end(trainer: Trainer, engine: Engine) -> None:
    """Refuse a run that could not be evaluated, or could not go back to a model that passed.

    Raises:
        ValueError: With the reason.
    """
    args, model = trainer.args, unwrapped(trainer)
    if trainer.eval_dataset is None:
        raise ValueError("Expected an eval_dataset for max_metric_drop, got none. Give the Trainer one.")
    if args.load_best_model_at_end:
        raise ValueError(
            "Expected load_best_model_at_end=False with max_metric_drop, got True: a run ends with its best checkpoint, "
            "or with the last one that passed. Set it to False."
        )
    if not engine.restores_layers:
        raise ValueError(
            "Expected one process or DDP for max_metric_drop, got an engine that cuts parameters into "
            "shards: a model there cannot get layers back. Set target_layers, and choose among the run's checkpoints."
        )
    if adapters_of(base_of(model)):
        raise ValueError(
            "Expected a model without adapters for max_metric_drop, got one with them: its checkpoints hold no layers that "
            "it could get back. Set target_layers instead."
        )


def watched_metric(config: TrimConfig, args: TrainingArguments) -> tuple[str, bool]:
    """The metric that `max_metric_drop` watches, without "eval_", and whether higher is better."""
    of_args = (args.metric_for_best_model or "loss").removeprefix("eval_")
    name = (config.stop_metric or of_args).removeprefix("eval_")
    if name == of_args and args.metric_for_best_model is not None and args.greater_is_better is not None:
        return name, args.greater_is_better
    return name, not name.endswith("loss")


def read_metric(metrics: dict[str, float], name: str, others_follow: bool) -> float | None:
    """The watched metric from an evaluation's metrics.

    Args:
        metrics: What the Trainer's evaluation returned.
        name: Its name without "eval_".
        others_follow: Whether another evaluation may contain it: a Trainer evaluates several data sets one by one.

    Raises:
        ValueError: If it is missing.
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


def judge(stop_state: StopState, config: TrimConfig, value: float, step: int, greater_is_better: bool) -> None:
    """Check an evaluation at a step: record the reference, whether it passes, and whether dropping stops.

    Raises:
        ValueError: If the reference would not be finite.
    """
    assert config.max_metric_drop is not None
    if config.reference_metric is not None:
        stop_state.reference = config.reference_metric
    elif stop_state.started_at is None:
        if not math.isfinite(value):
            raise ValueError(
                f"Expected a number for the reference at full depth, got {value} at step {step}. The run has diverged, or "
                "the metric is not defined on the evaluation set."
            )
        stop_state.reference = value
    assert stop_state.reference is not None  # dropping starts with an evaluation that passes
    limit = stop_state.reference + config.max_metric_drop * (-1 if greater_is_better else 1)
    stop_state.judged_at = step
    stop_state.passes = value >= limit if greater_is_better else value <= limit
    if stop_state.started_at is not None and not stop_state.passes and stop_state.stopped_at is None:
        stop_state.stopped_at = step
        logger.warning(
            f"Step {step}: no more layers are dropped. The metric is {value:.6g}, and with max_metric_drop="
            f"{config.max_metric_drop:g} of the reference {stop_state.reference:.6g} it may be {limit:.6g} at "
            f"{'least' if greater_is_better else 'most'}. Unless it heals, the run ends with the model of step "
            f"{stop_state.passed['step'] if stop_state.passed else None}."
        )
