"""`TrimTrainer`: a Trainer that trims, with calibration set, resume, and the best model at its own depth."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import logging

from ..engines import engine_class
from ..importance.calibration import set_aside
from ..layer_map import LayerMap
from ..loading.checkpoints import processes_of, run_of
from ..loading.trim_like import trim_like
from ..publish.card_data import TrimCardData
from .callback import TrimCallback
from .card_mixin import CardMixin
from .config import TrimConfig
from .distillation import DistillationMixin
from .given_optimizer import optimizer_follows
from .nodes import checkpoint_for_all
from .push_mixin import PushMixin
from .selection import LayerSelector, takes_calibration_examples
from .sparse_update import check_room, set_free, train_only
from .trainer_hooks import CallbackStateMixin, OptimizerMixin, TrainerSupport, unwrapped

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger("transformers.trimllm_hf")


class TrimTrainerMixin(PushMixin, CardMixin, DistillationMixin, OptimizerMixin, CallbackStateMixin, _Base):
    """Trimming for any subclass of Trainer: `class MyTrainer(TrimTrainerMixin, SFTTrainer): pass`.

    Compared with a plain Trainer with `TrimCallback`, it takes calibration examples out of the training set. On
    `train(resume_from_checkpoint=…)` it first gives the full-depth model the checkpoint's layers, and it skips incomplete
    checkpoints. It supports `trainable_ratio`, TrimLLM's sparse update, which must be set up before the optimizer is
    created, and a teacher (`distill_weight`). It writes the model card, in `save_model` and, with measured latency, in
    `create_model_card`. The final push to the Hub is checked and made as a single commit.

    Args:
        *args: As for the Trainer.
        trim: How far to trim, which layers, and when.
        calibration_dataset: Examples used to score layers, processed like the training set. Without it,
            `trim.calibration_size` examples of the training set are set aside (from a streaming one, the first).
        card_data: Information for the card that only you know; can be filled in later, as `trainer.card_data`.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: If `trim` is missing, a TrimCallback is passed as well, or the training set is too small.
    """

    def __init__(
        self,
        *args: Any,
        trim: TrimConfig | None = None,
        calibration_dataset: Any = None,
        card_data: TrimCardData | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(trim, TrimConfig):
            raise ValueError(f"Expected trim=TrimConfig(…), got {trim!r}. For training without trimming use Trainer.")
        self._resume_from: str | None = None
        self.trim_config = trim
        self.trim_support = TrainerSupport(freezes_layers=True)
        self.card_data = TrimCardData() if card_data is None else card_data
        super().__init__(*args, **kwargs)
        if trim.trainable_ratio is not None and self.optimizer is not None:
            raise ValueError(
                f"Expected the Trainer to make the optimizer, with trainable_ratio={trim.trainable_ratio}, got one that is "
                "made already (optimizers=…). Freeze layers yourself and leave trainable_ratio out, or pass "
                "optimizer_cls_and_kwargs."
            )
        if any(isinstance(callback, TrimCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("Expected one TrimCallback, got one in callbacks as well. TrimTrainer adds it: pass trim=.")
        if calibration_dataset is None and self.train_dataset is not None and takes_calibration_examples(trim):
            calibration_dataset, self.train_dataset = set_aside(
                self.train_dataset, trim.calibration_size, trim.calibration_seed
            )
            self.trim_support.calibration_set_aside = True
        self.calibration_dataset = calibration_dataset
        callback = TrimCallback(trim, trainer=self, calibration_dataset=calibration_dataset)
        self.add_callback(callback)
        self.after_callbacks()
        callback.on_init_end(self.args, self.state, self.control, model=self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does; on resume the model gets the checkpoint's layers first.

        Raises:
            ValueError: If there is no complete checkpoint to resume from, or the model cannot be trimmed to its layers.
        """
        if self.model_init is None and self.teacher is None:
            self.take_teacher(unwrapped(self))
        if resume_from_checkpoint:
            self._resume_from = resume_from_checkpoint = checkpoint_for_all(self, resume_from_checkpoint)
            saved = processes_of(self._resume_from)
            if saved is not None:
                engine_class(self.accelerator).refuse_other_processes(self.accelerator, saved)
            if self.model_init is None:
                with optimizer_follows(self, unwrapped(self)):
                    trim_like(unwrapped(self), self._resume_from)
        set_free(self.trim_support)
        self.training_finished = False
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resume_from = None
        self.training_finished = True
        return output

    def trim_callback(self) -> TrimCallback:
        """The callback with which this Trainer trims."""
        return next(held for held in self.callback_handler.callbacks if isinstance(held, TrimCallback))

    def after_callbacks(self) -> None:
        """Tell the callback what this Trainer does for it, also after it was recreated on resume."""
        callback = self.trim_callback()
        callback.support, callback.calibration_dataset = self.trim_support, self.calibration_dataset

    def call_model_init(self, trial: Any = None) -> Any:
        """Create the model with `model_init`, with the layers of the checkpoint that is being resumed from."""
        model: Any = super().call_model_init(trial)
        self.take_teacher(model)
        if self._resume_from is not None:
            trim_like(model, self._resume_from)
        return model

    def before_optimizer(self, dataloader: Any) -> None:
        """Choose the blocks to train and freeze the others, if `trainable_ratio` is set; once per run."""
        config, support = self.trim_config, self.trim_support
        if config.trainable_ratio is None:
            return
        model = unwrapped(self)
        layer_map = LayerMap.from_config(model.config, config.part)
        if self._resume_from is not None:
            support.trained_layers = run_of(self._resume_from).get("trained_layers")
            if support.trained_layers is None:
                raise ValueError(
                    f"Expected a checkpoint of a run with trainable_ratio, got {self._resume_from}, in which all layers "
                    "train. Leave trainable_ratio out to resume it."
                )
        if support.trained_layers is None:
            support.trained_layers = [layer_map.kept_layers[position] for position in self._choose(layer_map, dataloader)]
        kept = list(layer_map.kept_layers)
        positions = [kept.index(layer) for layer in support.trained_layers if layer in kept]
        support.frozen += map(weakref.ref, train_only(model, positions, config))

    def _choose(self, layer_map: LayerMap, dataloader: Any) -> list[int]:
        config, depth, model = self.trim_config, layer_map.num_layers, unwrapped(self)
        count = config.resolve_trainable(depth)
        with engine_class(self.accelerator).unprepared(self.accelerator, model) as process_group:
            selector = LayerSelector(config, self, process_group, dataloader, self.calibration_dataset)
            chosen = selector.most_important(model, count, self.is_local_process_zero() and not self.args.disable_tqdm)
        if not config.has_budget:
            check_room(chosen, depth, config.resolve_target(layer_map.base_num_layers, depth), config)
        layers = [layer_map.kept_layers[position] for position in chosen]
        logger.info(f"Training {count} of {depth} layers, by {config.score}: {layers}.")
        return chosen


class TrimTrainer(TrimTrainerMixin, Trainer):
    """`Trainer` that drops layers while it trains; see `TrimTrainerMixin`."""
