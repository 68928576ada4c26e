"""`TrimTrainer`: the Trainer that trims. Calibration set, resume, and the best model at its own depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import logging

from .auto import regrow_like, trim_like
from .calibration import set_aside
from .callback import TrimCallback
from .checkpoints import last_complete_checkpoint, processes_of
from .config import TrimConfig
from .distillation import DistillHost
from .engines import refuse_other_processes
from .engines.host import BestModelHost, unwrapped
from .importance import needs_data
from .layer_map import LayerMap
from .publish.card_data import TrimCardData
from .publish.card_host import CardHost
from .publish.push_host import PushHost

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger("transformers.trimllm_hf")


class TrimTrainerMixin(PushHost, CardHost, DistillHost, BestModelHost, _Base):
    """Trimming for any subclass of Trainer: `class MyTrainer(TrimTrainerMixin, SFTTrainer): pass`.

    Over a plain Trainer with `TrimCallback` it adds: calibration examples are taken out of the training set;
    `train(resume_from_checkpoint=…)` of a Trainer made with the full-depth model gives the model the checkpoint's layers
    first, and passes over checkpoints that a kill left half written; `load_best_model_at_end` loads a best checkpoint of
    another depth with the layers that belong to it; a teacher (`distill_weight`); the model card, by `save_model` and, with
    latency measured, `create_model_card`; a last push to the Hub that is checked and lands whole or not at all.

    Args:
        trim: How far to trim, which layers, and when.
        calibration_dataset: Examples to score layers by, processed like the training set. Without it,
            `trim.calibration_size` examples of the training set are set aside (of a streaming one: the first).
        card_data: What only you know and the card should say; can be filled later, as `trainer.card_data`.
        *args, **kwargs: As for the Trainer.

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
        self.card_data = TrimCardData() if card_data is None else card_data
        super().__init__(*args, **kwargs)
        if any(isinstance(callback, TrimCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("Expected one TrimCallback, got one in callbacks as well. TrimTrainer adds it: pass trim=.")
        if calibration_dataset is None and self.train_dataset is not None and needs_data(trim.importance):
            calibration_dataset, self.train_dataset = set_aside(
                self.train_dataset, trim.calibration_size, trim.calibration_seed
            )
            self.calibration_set_aside = True
        self.calibration_dataset = calibration_dataset
        callback = TrimCallback(trim, trainer=self, calibration_dataset=calibration_dataset)
        self.add_callback(callback)
        callback.on_init_end(self.args, self.state, self.control, model=self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does; on resume the model gets the checkpoint's layers first.

        Raises:
            ValueError: If there is no complete checkpoint to resume from, or the model cannot get its layers.
        """
        if self.model_init is None and self.teacher is None:
            self.take_teacher(unwrapped(self))
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            self._resume_from = str(resume_from_checkpoint)
            refuse_other_processes(self.accelerator, processes_of(self._resume_from))
            if self.model_init is None:
                trim_like(unwrapped(self), self._resume_from)
        self.training_finished = False
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resume_from = None
        self.training_finished = True
        return output

    def trim_callback(self) -> TrimCallback:
        """The callback that this Trainer trims by."""
        return next(held for held in self.callback_handler.callbacks if isinstance(held, TrimCallback))

    def call_model_init(self, trial: Any = None) -> Any:
        """Make the model by `model_init`, with the layers of the checkpoint that is being resumed from."""
        model: Any = super().call_model_init(trial)
        self.take_teacher(model)
        if self._resume_from is not None:
            trim_like(model, self._resume_from)
        return model

    def before_best_model(self, checkpoint: str) -> None:
        """Give the model the depth of the best checkpoint, which the Trainer is about to load."""
        best = LayerMap.from_checkpoint(checkpoint)
        callback = self.trim_callback()
        if best is None or callback.layer_map is None or best.keeps_the_same(callback.layer_map):
            return
        logger.warning(
            f"The best checkpoint, {checkpoint}, keeps the layers {best} and not those "
            f"that training ended with: the model gets its layers back. To end with the trimmed model, set "
            "load_best_model_at_end=False."
        )
        callback.regrow(lambda: regrow_like(unwrapped(self), checkpoint))


class TrimTrainer(TrimTrainerMixin, Trainer):
    """`Trainer` that drops layers while it trains; see `TrimTrainerMixin`."""
