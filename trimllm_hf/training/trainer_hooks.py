"""transformers' Trainer as a host: how a callback finds it, and the one private method to step in front of."""

from __future__ import annotations

import gc
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback


class BestModelMixin:
    """Calls `before_best_model` before a Trainer loads its best checkpoint into the model.

    `Trainer._load_best_model` has no public seam, and loads a checkpoint of another depth by index.
    """

    state: Any

    def before_best_model(self, checkpoint: str) -> None:
        """Make the model ready for the weights in `checkpoint`."""
        raise NotImplementedError

    def _load_best_model(self) -> None:
        self.before_best_model(self.state.best_model_checkpoint)
        super()._load_best_model()  # type: ignore[misc]  # the Trainer's, by the order of the bases


class OptimizerMixin:
    """Calls `before_optimizer` before a Trainer, or DeepSpeed for it, looks at which parameters train.

    Neither has a seam there: a callback's first turn comes when the optimizer is made. This is the last public method
    that the Trainer calls before.
    """

    def before_optimizer(self, dataloader: Any) -> None:
        """Settle which parameters train."""
        raise NotImplementedError

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any, **named: Any) -> Any:
        """As the Trainer's."""
        self.before_optimizer(dataloader)
        return super().set_initial_training_values(args, dataloader, *more, **named)  # type: ignore[misc]


def find_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that a callback was given to: one walk over the live objects, 0.1 to 0.3 s, once a run.

    Raises:
        ValueError: If no Trainer, or more than one, holds the callback.
    """
    found = [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), Trainer)  # isinstance would wake lazy proxies
        and any(held is callback for held in getattr(getattr(candidate, "callback_handler", None), "callbacks", ()))
    ]
    if len(found) != 1:
        raise ValueError(
            f"Expected {type(callback).__name__} to be held by one Trainer, got {len(found)}. Pass it to one Trainer, as "
            "callbacks=[…], or name it: TrimCallback(config, trainer=trainer)."
        )
    return found[0]


def unwrapped(trainer: Trainer) -> PreTrainedModel:
    """The Trainer's model without any engine's wrapper and not compiled; a PeftModel keeps its own."""
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model


def save_model(trainer: Trainer, folder: str) -> None:
    """Save the model, by all processes, without a push."""
    trainer.save_model(folder, _internal_call=True)


def finish_current_push(trainer: Trainer) -> None:
    """Wait until a push that the Trainer made at a save, in the background, is through."""
    trainer._finish_current_push()
