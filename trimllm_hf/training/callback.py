"""`TrimCallback`: drops layers while a Trainer trains, one line in a script."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..engines import Engine, attach
from ..importance import needs_data
from ..layer_map import LayerMap
from ..loading.depth_check import refuse_deeper_best, refuse_other_depths, wrong_depth
from ..loading.trim_like import restore_layers_from
from ..surgery.adapters import adapters_of, base_of, patch_adapter_save
from ..surgery.blocks import find_blocks
from .budget import Budget
from .config import TrimConfig
from .distillation import refuse_another_teacher
from .drop_log import drop_log
from .dry_run import droppable, dry_run
from .layer_times import ms_of_layers
from .prepared_loop import apply_drop
from .schedule import Plan, layers_due, plan_drops
from .selection import LayerSelector, check_scores
from .sparse_update import refuse_bare_callback, refuse_other_share
from .stop_rules import MetricRule
from .trainer_hooks import find_trainer, unwrapped

logger = logging.get_logger("transformers.trimllm_hf")  # below transformers' logger: its verbosity and handlers


class TrimCallback(TrainerCallback, ExportableState):
    """Drops the least important layers of the model while it is fine-tuned.

    `Trainer(callbacks=[TrimCallback(TrimConfig(target_layers=16))])` is all that a script needs, in one process and under
    data-parallel training (DDP), with `Trainer` and its subclasses. The kept-layer map goes into `model.config.trim`, the
    checkpoints' trainer_state.json, and the logs (`trim/num_layers`, `trim/parameters`, `trim/score`, `trim/margin`).

    Args:
        config: The settings (or, as a Trainer hands them back on resume, a dict of them).
        trainer: The Trainer, if it is at hand; else it is looked up when training begins.
        calibration_dataset: Examples to score layers by, processed like the training set. Without it, `TrimTrainer` sets
            training examples aside; under another Trainer they are drawn from the training set, which still trains on
            them. Never the evaluation set.

    Raises:
        ValueError: When training begins, before anything is changed: on a target that the model or the plan cannot
            reach, a model or engine that cannot be trimmed, or a resumed checkpoint that keeps other layers than the
            model.
    """

    def __init__(
        self,
        config: TrimConfig | dict[str, Any],
        trainer: Trainer | None = None,
        calibration_dataset: Any = None,
    ) -> None:
        self.config = config if isinstance(config, TrimConfig) else TrimConfig(**config)
        self.trainer = trainer
        self.calibration_dataset = calibration_dataset
        self.layer_map: LayerMap | None = None
        self.start_num_layers: int | None = None  # depth when this run began: the plan counts from it
        self.plan: Plan = {}
        self.trained_layers: list[int] | None = None  # of the sparse update, in the base's numbering
        self.model_step: int | None = None  # the step that the model is of, if the run ended with an earlier one
        self.calibration_given = calibration_dataset is not None
        self.stop: dict[str, Any] = {}  # where the run stands with its stop rules
        self.budget: dict[str, Any] = {}
        self.unit_ms: dict[str, float] = {}  # what each layer takes, where scores are per ms
        self._rule: MetricRule | None = None
        self._budget: Budget | None = None
        self._engine: Engine | None = None
        self._watched: weakref.ref[nn.Module] | None = None
        self._selector: LayerSelector | None = None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds: the settings, the map, and where the run began."""
        return {
            "args": {"config": asdict(self.config)},
            "attributes": {
                "layer_map": None if self.layer_map is None else self._plain_map(),
                "start_num_layers": self.start_num_layers,
                "calibration_given": self.calibration_given,
                "trained_layers": self.trained_layers,
                "teacher": getattr(getattr(self.trainer, "teacher", None), "fingerprint", None),
                "stop": self._rule.state() if self._rule else self.stop,
                "budget": self._budget.state() if self._budget else self.budget,
                "unit_ms": self.unit_ms,
                "num_processes": 1 if self._engine is None else self._engine.world_size,
            },
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch the model, so that weights of another depth are refused instead of loaded by index."""
        check_scores(self.config)
        refuse_bare_callback(self.config, self.trainer)
        if kwargs["model"] is not None:
            self._watch(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check everything that can be checked, make the plan, and drop what is due before the first step."""
        self.trainer = trainer = self.trainer or find_trainer(self)
        model = unwrapped(trainer)
        self._watch(model)
        stateful: Any = state.stateful_callbacks  # a dict by class name, whatever its annotation says
        saved = stateful.setdefault(type(self).__name__, self.state())  # a checkpoint may be from before this callback
        self._restore(saved["attributes"], model, state)
        refuse_another_teacher(trainer, self.config, saved["attributes"].get("teacher") if state.global_step else None)
        assert self.layer_map is not None and self.start_num_layers is not None
        self._engine = attach(trainer.accelerator, trainer.model_wrapped, trainer.optimizer)
        base_layers = self.layer_map.base_num_layers * (2 if self.config.unit == "sublayer" else 1)
        target = self._least = self.config.resolve_target(base_layers, self._num_layers())
        if self.config.has_budget:
            self._budget = Budget(self.config, self._engine, args, self.budget)
            target = self._budget.target(model, self._least, droppable(model, self.config))
        self.plan = plan_drops(
            self.config,
            self.start_num_layers,
            target,
            state.max_steps,
            _steps_per_epoch(args, kwargs["train_dataloader"]),
        )
        self._take_adapters(base_of(model), args)
        if self.config.max_metric_drop is not None:
            self._rule = MetricRule(self.config, trainer, self._engine, self.plan, self.stop)
        if self.plan:
            sizes = dry_run(model, self.config, self._num_layers() - target)  # raises where there is no way
            refuse_deeper_best(args.load_best_model_at_end, self.plan, self._engine.restores_layers)
            self._refuse_lost_calibration_set()
            self.unit_ms = self.unit_ms or ms_of_layers(model, self.config, self._engine, args)
            data = kwargs["train_dataloader"], self.calibration_dataset
            spared = self.trained_layers or ()
            self._selector = LayerSelector(self.config, trainer, self._engine, *data, spared, sizes, self.unit_ms)
        if self._rule is None or self._rule.allows(state.global_step):
            self._drop_what_is_due(state, control)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what an evaluation after the step before has allowed."""
        if self._rule is not None and self._rule.allows(state.global_step):
            self._drop_what_is_due(state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score by the gradients of this step, where that is the importance and a drop may follow."""
        if self.config.importance == "taylor" and self._selector is not None and self.trainer is not None:
            assert self.layer_map is not None and self.start_num_layers is not None
            step = state.global_step + 1
            dropped = self.start_num_layers - self._num_layers()
            if self._rule is not None or self._budget is not None or layers_due(self.plan, step, dropped):
                self._selector.take_gradients(unwrapped(self.trainer), step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what is due after this optimizer step; under a stop rule on a metric, have the model evaluated first."""
        if self._rule is None:
            self._drop_what_is_due(state, control)
        elif self._rule.must_evaluate(state.global_step, self._due(state)):
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Judge the model by the metric, where there is a stop rule on it."""
        if self._rule is not None and self._engine is not None:  # not after training
            assert self.layer_map is not None
            self._rule.evaluated(kwargs["metrics"], state.global_step, self.layer_map, self._due(state) > 0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove models that no checkpoint has to go back to."""
        if self._rule is not None:
            self._rule.tidy()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let go of the calibration batches and of the engine's references; what is saved from here is a whole model."""
        if self._engine is not None and self.trainer is not None:
            if self._rule is not None:
                self._end_with_what_passed(self._rule, self.trainer)
            if self._budget is not None:
                self._budget.report(unwrapped(self.trainer))
            self._engine.save_whole()
        self._selector = self._engine = None

    def _restore(self, attributes: dict[str, Any], model: PreTrainedModel, state: TrainerState) -> None:
        """Take up the run that the checkpoint holds; a run that starts now begins with the model's own map."""
        of_model = LayerMap.from_config(model.config, self.config.part)
        plain = attributes["layer_map"]
        if state.global_step == 0 or plain is None:
            self.layer_map, self.start_num_layers = of_model, of_model.num_units(self.config.unit)
            self.stop, self.budget, self.unit_ms = {}, {}, {}
            return
        of_checkpoint = LayerMap.from_dict(plain) if isinstance(plain, dict) else plain
        if not of_checkpoint.keeps_the_same(of_model):
            raise ValueError(wrong_depth(of_model, of_checkpoint))
        refuse_other_share(attributes.get("trained_layers"), self.trained_layers)
        self.layer_map, self.start_num_layers = of_checkpoint, attributes["start_num_layers"]
        self.stop, self.budget, self.unit_ms = (attributes.get(name, {}) for name in ("stop", "budget", "unit_ms"))
        model.config.trim = self._plain_map()

    def _take_adapters(self, base: PreTrainedModel, args: TrainingArguments) -> None:
        assert self.layer_map is not None
        deeper = args.load_best_model_at_end or self.config.max_metric_drop is not None
        if adapters_of(base) and deeper and (self.plan or self.layer_map.dropped_layers):
            raise ValueError(
                "Expected neither load_best_model_at_end nor max_metric_drop when a model with adapters is trimmed: to go "
                "back it would need layers of the base that are gone by then, and a checkpoint holds the adapter only. Load "
                "one yourself: trim_like(base, checkpoint), then PeftModel.from_pretrained(base, checkpoint)."
            )
        patch_adapter_save(base, find_blocks(base, self.config.part).name, self.layer_map)

    def _watch(self, model: nn.Module) -> None:
        if self._watched is None or self._watched() is not model:
            refuse_other_depths(model, self.config.part)
            self._watched = weakref.ref(model)

    def _refuse_lost_calibration_set(self) -> None:
        if self.calibration_dataset is None and self.calibration_given and needs_data(self.config.importance):
            raise ValueError(
                "Expected the calibration_dataset that this run began with, got none: the Trainer made this callback "
                "anew. Set restore_callback_states_from_checkpoint=False; TrimCallback restores its state by itself."
            )

    def _due(self, state: TrainerState) -> int:
        """How many layers have to go now, as far as no evaluation stands in the way."""
        assert self.layer_map is not None and self.start_num_layers is not None and self.trainer is not None
        step, depth = state.global_step, self._num_layers()
        if self._rule is not None:
            if not self._rule.is_open(step):
                return 0
            step = self._rule.plan_step(step)
        due = layers_due(self.plan, step, self.start_num_layers - depth)
        if self._budget is None or not self.plan:
            return due
        if self._budget.met(unwrapped(self.trainer)):
            return 0
        if due == 0 and step >= max(self.plan):  # further than planned: under a stop rule, each one is evaluated
            return min(depth - self._least, self.config.layers_per_drop if self._rule else depth)
        return due

    def _drop_what_is_due(self, state: TrainerState, control: TrainerControl) -> None:
        should_log = control.should_log
        due = self._due(state)
        while due > 0:
            assert self._selector is not None and self.layer_map is not None
            allotted = due if self._budget is None else min(due, self.config.layers_per_drop)
            count = self._selector.at_once(allotted, self.layer_map.num_layers)  # a whole pattern goes with its first layer
            self._drop(state, count)
            due = self._due(state) if self._rule is None else min(due - count, self._due(state))
        control.should_log = should_log  # logging a drop clears it, and this step's loss would go unlogged

    def _drop(self, state: TrainerState, count: int) -> None:
        """Choose by scores of the model as it is now, and drop."""
        assert self.trainer is not None and self._engine is not None and self._selector is not None
        model = unwrapped(self.trainer)
        progress = state.is_local_process_zero and not self.trainer.args.disable_tqdm
        self.layer_map = apply_drop(self._engine, self._selector.next_drop(model, state.global_step, progress, count))
        if self._rule is not None:
            self._rule.dropped(state.global_step)
        line, logs = drop_log(
            self.layer_map, self.config.unit, state.global_step, self._selector.margin, get_model_param_count(model)
        )
        logger.info(line)
        self.trainer.log(logs)

    def _end_with_what_passed(self, rule: MetricRule, trainer: Trainer) -> None:
        """Give the model back the layers and weights with which it last passed, if it does not pass now."""
        passed = rule.passed_instead(trainer.state.global_step)
        if passed is not None:
            model, (folder, layer_map, self.model_step) = unwrapped(trainer), passed
            self.restore_layers(lambda: restore_layers_from(model, folder, layer_map))
            trainer.log({"trim/num_layers": self._num_layers(), "trim/parameters": get_model_param_count(model)})

    def restore_layers(self, edit: Callable[[], LayerMap]) -> None:
        """Run an edit that gives the model other layers when training is over, and take up the map that it returns."""
        assert self._engine is not None and self.trainer is not None
        blocks = find_blocks(unwrapped(self.trainer), self.config.part).blocks
        self.layer_map = self._engine.edit(edit, lambda: list(blocks.parameters()))
        self.trainer.optimizer = self.trainer.lr_scheduler = None  # made for other layers; a later train() makes them anew

    def _num_layers(self) -> int:
        """Depth now, in the unit."""
        assert self.layer_map is not None
        return self.layer_map.num_units(self.config.unit)

    def _plain_map(self) -> dict[str, Any]:
        assert isinstance(self.layer_map, LayerMap)
        return self.layer_map.to_dict()


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    if not has_length(dataloader):
        return None
    return max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
