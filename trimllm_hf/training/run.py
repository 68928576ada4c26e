"""One call of `Trainer.train` that trims: its state while it runs, and the record that remains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..engines import Changes, Engine, attach
from ..layer_map import UNITS, LayerMap
from ..loading.trim_like import restore_layers_from
from ..surgery.adapter_files import patch_adapter_save
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from .best_model import forget_best
from .budget import Budget, BudgetState
from .config import TrimConfig
from .drop_log import DropRecords, drop_log, dropped_names, record_drops
from .drop_schedule import DropSchedule
from .dry_run import droppable, dry_run
from .followers import refuse_followers
from .layer_times import ms_of_layers
from .nodes import warn_unshared_checkpoints
from .prepared_loop import apply_drop
from .repairer import Repairer
from .schedule import plan_drops
from .selection import LayerSelector
from .start_checks import refuse_emptied_groups, refuse_lost_calibration_set, refuse_reached_target, rehearse_scores
from .stop_rules import MetricRule, StopState
from .trainer_hooks import unwrapped

logger = logging.get_logger("transformers.trimllm_hf")  # a child of transformers' logger, with its verbosity and handlers


@dataclass
class RunRecord:
    """The record of a run in plain values, stored in checkpoints and used for the card.

    Attributes:
        layer_map: The layers that the model keeps.
        start_num_layers: Depth when the run began, in the unit; the plan counts from it.
        calibration_given: Whether the calibration examples were passed instead of drawn from the training set.
        num_processes: Number of processes of the run.
        trained_layers: The layers trained by the sparse update, in the base's numbering; None: all layers train.
        teacher: The fingerprint of the teacher, if there is one.
        unit_ms: The time that each layer takes, if scores are per ms.
        target_num_layers: The target depth of the plan.
        stop: The state of the stop rule.
        budget: The measurements for the budget.
        model_step: The step of the final model, if the run ended with an earlier one.
        repairs: The result of the repair for each drop that was to be repaired.
        scans: For each drop: its step, the seconds since the run began, the depth after it, the dropped layers, and the
            scoring: the importance, each layer's score by name, and its standard error over the calibration batches.
    """

    layer_map: LayerMap
    start_num_layers: int
    calibration_given: bool = False
    num_processes: int = 1
    trained_layers: list[int] | None = None
    teacher: str | None = None
    unit_ms: dict[str, float] = field(default_factory=dict)
    stop: StopState = field(default_factory=StopState)
    budget: BudgetState = field(default_factory=BudgetState)
    model_step: int | None = None
    repairs: list[dict[str, Any]] = field(default_factory=list)
    scans: list[dict[str, Any]] = field(default_factory=list)
    target_num_layers: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for trainer_state.json."""
        return {**asdict(self), "layer_map": self.layer_map.to_dict()}

    def asked_num_layers(self, unit: str) -> int | None:
        """The target depth, if the model has more layers than that."""
        target = self.target_num_layers
        return target if target is not None and self.layer_map.num_units(unit) > target else None

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RunRecord:
        """Read the record of a checkpoint; values missing in older checkpoints get their defaults."""
        values = {each.name: plain[each.name] for each in fields(cls) if each.name in plain}
        values["layer_map"] = LayerMap.from_dict(plain["layer_map"])
        values["stop"] = StopState(**plain.get("stop", {}))
        values["budget"] = BudgetState(**plain.get("budget", {}))
        return cls(**values)


@dataclass
class Run:
    """A run in progress, from `on_train_begin` to `on_train_end`.

    Attributes:
        config: The settings.
        trainer: The Trainer.
        engine: Updates everything around the model after a drop.
        record: The record of the run.
        schedule: Determines when layers are dropped, and how many.
        selector: Determines which layers are dropped; None if nothing is to be dropped.
        records: Adds drops to the Trainer's log.
        repairer: Repairs the model for each drop; None: no repair.
    """

    config: TrimConfig
    trainer: Trainer
    engine: Engine
    record: RunRecord
    schedule: DropSchedule
    selector: LayerSelector | None
    records: DropRecords
    repairer: Repairer | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, without any engine's wrapper."""
        return unwrapped(self.trainer)

    @property
    def depth(self) -> int:
        """Current depth, in the unit."""
        return self.record.layer_map.num_units(self.config.unit)

    def drop_what_is_due(self, step: int) -> None:
        """Drop what is due after this optimizer step, unless an evaluation must come first."""
        due = self.schedule.due_now(step, self.depth, self.model)
        while due > 0 and self.selector is not None:
            at_once = self.schedule.at_once(due)  # a whole pattern may be dropped with its first layer
            count = self.selector.at_once(at_once, self.record.layer_map.num_layers)
            self._drop(self.selector, step, count)
            due = self.schedule.still_due(due - count, step, self.depth, self.model)

    def refuse_followers(self) -> None:
        """Refuse other objects that hold the model's layers, if layers are still to be dropped."""
        if self.record.asked_num_layers(self.config.unit) is not None:
            refuse_followers(self.trainer, self.model, self.config.part)

    def take_gradients(self, step: int) -> None:
        """Score by the gradients of this step, if the importance uses them and a drop may follow."""
        if self.config.importance == "taylor" and self.selector is not None:
            if self.schedule.may_drop_after(step, self.depth):
                self.selector.take_gradients(self.model, step)

    def must_evaluate(self, step: int) -> bool:
        """Whether the model must be evaluated after this step."""
        return self.schedule.must_evaluate(step, self.depth, self.model)

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """Apply the stop rule on a metric, if there is one, to an evaluation."""
        if self.schedule.rule is not None:
            due = self.schedule.due(step, self.depth, self.model) > 0
            self.schedule.rule.evaluated(metrics, step, self.record.layer_map, due)

    def end(self) -> None:
        """Restore the model that last passed, if the current one does not pass; from here on, full models are saved."""
        if self.schedule.rule is not None:
            passed = self.schedule.rule.passed_instead(self.trainer.state.global_step)
            if passed is not None:
                folder, layer_map, self.record.model_step = passed
                model = self.model
                self.restore_layers(lambda: restore_layers_from(model, folder, layer_map))
                self.trainer.log({"trim/num_layers": self.depth, "trim/parameters": get_model_param_count(model)})
        if self.schedule.budget is not None:
            self.schedule.budget.report(self.model)
        self._warn_of_what_is_left()
        self.engine.save_whole()

    def restore_layers(self, edit: Callable[[], LayerMap]) -> None:
        """Run an edit that changes the model's layers after training, and adopt the map that it returns."""
        blocks = find_blocks(self.model, self.config.part).blocks
        self.record.layer_map = self.engine.edit(edit, lambda: list(blocks.parameters()))
        self.trainer.optimizer = self.trainer.lr_scheduler = None  # made for other layers; a later train() creates new ones

    def _warn_of_what_is_left(self) -> None:
        state, target = self.trainer.state, self.record.asked_num_layers(self.config.unit)
        by_rule = self.schedule.rule is not None or self.schedule.budget is not None  # these have logged the reason
        if target is not None and not by_rule:
            logger.warning(
                f"The run ended at step {state.global_step} of {state.max_steps}, before its plan was done: the model has "
                f"{self.depth} layers, and {target} were asked for. Resume the last checkpoint to go on, without what "
                "stopped it (early stopping, should_training_stop, a time limit)."
            )
        if self.trainer.args.load_best_model_at_end and self.schedule.plan and state.best_model_checkpoint is None:
            logger.warning(
                f"No checkpoint with {self.depth} layers was evaluated and saved: the run ends with the model of its last "
                "step, not with a best one. Evaluate and save after the last drop."
            )

    def _drop(self, selector: LayerSelector, step: int, count: int) -> None:
        """Choose layers by the scores of the current model, and drop them."""
        trainer, model = self.trainer, self.model
        progress = trainer.is_local_process_zero() and not trainer.args.disable_tqdm
        drop = selector.next_drop(model, step, progress, count)
        changes: Changes = ()
        if self.repairer is not None:
            repair, told = self.repairer.repair_for(drop)
            changes = repair.changes(model) if repair is not None else ()
            self.record.repairs.append({"step": step, **told})
        self.record.layer_map = apply_drop(self.engine, drop, changes)
        when = {"step": step, "seconds": self.records.seconds, "num_layers": self.depth}
        self.record.scans.append({**when, "dropped": dropped_names(self.record.layer_map), **selector.scoring})
        if self.schedule.rule is not None:
            self.schedule.rule.dropped(step)
        parameters = get_model_param_count(model)
        line, logs = drop_log(self.record.layer_map, self.config.unit, step, selector.margin, parameters)
        logger.info(line)
        forget_best(trainer.state)
        self.records.pending, self.records.layer_map = logs, self.record.layer_map


def begin_run(
    config: TrimConfig,
    trainer: Trainer,
    record: RunRecord,
    state: TrainerState,
    dataloader: Any,
    calibration_dataset: Any = None,
    goes_on: bool = False,
) -> Run:
    """Check everything that can be checked in advance, and make the plan. The model is not changed.

    Args:
        config: The settings.
        trainer: The Trainer, prepared.
        record: The record of the run: new, or from a checkpoint.
        state: The Trainer's state.
        dataloader: The training data loader.
        calibration_dataset: Examples used to score layers; None: drawn from the training set.
        goes_on: Whether the run continues an earlier run or a checkpoint, whose model may be at the target already.

    Raises:
        ValueError: If the model or the plan cannot reach the target, the model or engine cannot be trimmed, or the layers
            cannot be scored.
    """
    started, args, model = time.perf_counter(), trainer.args, unwrapped(trainer)
    engine = attach(trainer.accelerator, trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler)
    record.num_processes = engine.world_size
    warn_unshared_checkpoints(engine, trainer)
    depth = record.layer_map.num_units(config.unit)
    base_depth = record.layer_map.base_num_layers * UNITS[config.unit]
    target = least = config.resolve_target(base_depth, depth)
    if not goes_on:
        refuse_reached_target(config, base_depth, depth)
    budget = rule = selector = repairer = None
    if config.has_budget:
        budget = Budget(config, engine, args, record.budget)
        target = budget.target(model, least, droppable(model, config))
    per_epoch = _steps_per_epoch(args.gradient_accumulation_steps, dataloader)
    plan = plan_drops(config, record.start_num_layers, target, state.max_steps, per_epoch)
    record.target_num_layers = target if plan else None
    base = base_of(model)
    patch_adapter_save(base, find_blocks(base, config.part).name, record.layer_map)
    if config.max_metric_drop is not None:
        rule = MetricRule(config, trainer, engine, plan, record.stop)
    if plan:
        sizes = dry_run(model, config, depth - target)  # raises if it is impossible
        refuse_emptied_groups(engine, model, config, depth - target)
        refuse_followers(trainer, model, config.part)
        refuse_lost_calibration_set(config, record.calibration_given, calibration_dataset)
        record.unit_ms = record.unit_ms or ms_of_layers(model, config, engine, args)
        spared = record.trained_layers or ()
        if config.repair != "none":
            repairer = Repairer(config, trainer, engine, dataloader, calibration_dataset)
            repairer.check(model)
        of_step = args.train_batch_size * args.gradient_accumulation_steps * engine.world_size
        examples = state.max_steps * of_step / len(plan)  # per selection of layers
        selector = LayerSelector(
            config, trainer, engine, dataloader, calibration_dataset, spared, sizes, record.unit_ms, examples, repairer
        )  # fmt: skip
        rehearse_scores(selector, model)
    schedule = DropSchedule(plan, record.start_num_layers, least, config.layers_per_drop, rule, budget)
    return Run(config, trainer, engine, record, schedule, selector, record_drops(trainer, started), repairer)


def _steps_per_epoch(accumulation_steps: int, dataloader: Any) -> int | None:
    if not has_length(dataloader):
        return None
    return max(1, math.ceil(len(dataloader) / accumulation_steps))
