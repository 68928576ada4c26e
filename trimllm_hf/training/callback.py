"""`TrimCallback`: drops layers while a Trainer trains, one line in a script."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..layer_map import LayerMap, run_in
from ..loading.depth_check import refuse_other_depths, wrong_depth
from ..surgery.unshare_config import give_own_config
from .best_model import forget_other_best
from .config import TrimConfig
from .distillation import refuse_another_teacher
from .run import Run, RunRecord, begin_run
from .sparse_update import refuse_bare_callback, refuse_other_share
from .start_checks import check_scores, refuse_several
from .trainer_hooks import TrainerSupport, find_trainer, finish_current_push, unwrapped


class TrimCallback(TrainerCallback, ExportableState):
    """Drops the least important layers of the model while it is fine-tuned.

    `Trainer(callbacks=[TrimCallback(TrimConfig(target_layers=16))])` is all that a script needs, in one process and under
    data-parallel training (DDP), with `Trainer` and its subclasses. The kept-layer map is stored in `model.config.trim`
    and in the checkpoints' trainer_state.json; `trim/num_layers`, `trim/parameters`, `trim/score` and `trim/margin` are
    logged.

    Args:
        config: The settings (or a dict of them, as a Trainer passes them on resume).
        trainer: The Trainer, if available; else it is looked up whenever training begins.
        calibration_dataset: Examples used to score layers, processed like the training set. Without it, `TrimTrainer` sets
            training examples aside; under another Trainer they are drawn from the training set and are still trained on.
            Never the evaluation set.

    Attributes:
        record: The record of the current or last run; None before the first.
        run: The current run; None before and after it.
        support: What the Trainer does for a run that a callback cannot.

    Raises:
        ValueError: When training begins, before anything is changed: if the model or the plan cannot reach the target, the
            model or engine cannot be trimmed, or a resumed checkpoint keeps other layers than the model.
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
        self.support = TrainerSupport()
        self.record: RunRecord | None = None
        self.run: Run | None = None
        self._checked = False  # whether other holders of the layers were checked for
        self._watched: weakref.ref[nn.Module] | None = None
        self._watch_handle: RemovableHandle | None = None

    @property
    def layer_map(self) -> LayerMap | None:
        """The layers that the model keeps; None before the first run."""
        return None if self.record is None else self.record.layer_map

    def state(self) -> dict[str, Any]:
        """The contents of trainer_state.json: the settings, and the record of the run."""
        record = None if self.record is None else self.record.to_dict()
        return {"args": {"config": asdict(self.config)}, "attributes": {"saved_run": record}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch the model, so that weights of another depth are refused instead of loaded by index."""
        check_scores(self.config)
        refuse_bare_callback(self.config, self.support)
        if kwargs["model"] is not None:
            self._watch(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check everything that can be checked, make the plan, and drop what is due before the first step."""
        trainer = find_trainer(self, state, self.trainer)
        refuse_several([held for held in trainer.callback_handler.callbacks if isinstance(held, TrimCallback)])
        model = unwrapped(trainer)
        self.run, self._checked = None, False
        if trainer.model_init is not None:  # the next model may be built from the same config
            give_own_config(model)
        self._watch(model)
        record = self._record(trainer, model, state)
        goes_on = state.global_step > 0 or (self.layer_map is not None and record.layer_map.keeps_the_same(self.layer_map))
        forget_other_best(state, record.layer_map)
        data = kwargs["train_dataloader"], self.calibration_dataset
        run = begin_run(self.config, trainer, record, state, *data, goes_on)
        self.record, self.run = record, run
        run.drop_what_is_due(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what an evaluation after the previous step has allowed."""
        if self.run is not None and not self._checked:  # by now other callbacks have created their objects
            self.run.refuse_followers()
            self._checked = True
        if self.run is not None and self.run.schedule.rule is not None:
            self.run.drop_what_is_due(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score by the gradients of this step, if the importance uses them and a drop may follow."""
        if self.run is not None:
            self.run.take_gradients(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what is due after this optimizer step; under a stop rule on a metric, have the model evaluated first."""
        if self.run is not None:
            self.run.drop_what_is_due(state.global_step)
            control.should_evaluate = control.should_evaluate or self.run.must_evaluate(state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the metric against the stop rule, if there is one."""
        if self.run is not None:  # not after training
            self.run.evaluated(kwargs["metrics"], state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove saved models that no checkpoint needs to go back to."""
        if self.run is not None and self.run.schedule.rule is not None:
            self.run.schedule.rule.saved()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the push of an earlier save, which reads the folder whose files this save is about to replace.

        Otherwise, with `hub_always_push`, a commit could hold the config of one depth and the weights of another.
        """
        if self.run is not None:
            finish_current_push(self.run.trainer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run: it releases the Trainer, the calibration batches and the engine."""
        if self.run is not None:
            self.run.end()
            self.run = None
        if self._watch_handle is not None:  # the best model is loaded by now
            self._watch_handle.remove()
            self._watch_handle = self._watched = None

    def _record(self, trainer: Trainer, model: PreTrainedModel, state: TrainerState) -> RunRecord:
        """The record of the run from the checkpoint; for a new run, one with the model's own map."""
        of_model = LayerMap.from_config(model.config, self.config.part)
        saved = run_in({"stateful_callbacks": state.stateful_callbacks}) if state.global_step else {}
        refuse_another_teacher(trainer, self.support, self.config, saved.get("teacher"))
        if saved:
            record = RunRecord.from_dict(saved)
            if not record.layer_map.keeps_the_same(of_model):
                raise ValueError(wrong_depth(of_model, record.layer_map))
            refuse_other_share(record.trained_layers, self.support.trained_layers)
            model.config.trim = record.layer_map.to_dict()
        else:  # also for a checkpoint saved without this callback
            record = RunRecord(of_model, of_model.num_units(self.config.unit), self.calibration_dataset is not None)
        record.teacher, record.trained_layers = self.support.teacher, self.support.trained_layers
        return record

    def _watch(self, model: nn.Module) -> None:
        if self._watched is None or self._watched() is not model:
            self._watch_handle = refuse_other_depths(model, self.config.part)
            self._watched = weakref.ref(model)
