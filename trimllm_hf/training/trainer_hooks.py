"""Access to transformers' Trainer: how a callback finds it, what it does for one, and hooks before its private methods."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from ..surgery.adapters import inner_model


@dataclass
class TrainerSupport:
    """What a Trainer does for a run that a callback cannot; it passes this to its callback. Defaults: an unchanged Trainer.

    Attributes:
        freezes_layers: Whether it chooses which layers train before the optimizer is created (`trainable_ratio`).
        calibration_set_aside: Whether it has taken the calibration examples out of the training set.
        trained_layers: The layers that train, in the base's numbering, if it froze the others.
        frozen: The parameters that it froze for this.
        teacher: The fingerprint of the teacher, if it has one.
    """

    freezes_layers: bool = False
    calibration_set_aside: bool = False
    trained_layers: list[int] | None = None
    frozen: list[weakref.ref[torch.nn.Parameter]] = field(default_factory=list)
    teacher: str | None = None


class OptimizerMixin:
    """Calls `before_optimizer` before a Trainer, or DeepSpeed for it, collects the trainable parameters.

    Neither has a hook there: a callback is first called after the optimizer is created. This is the last public method
    that the Trainer calls before that.
    """

    def before_optimizer(self, dataloader: Any) -> None:
        """Choose which parameters train."""
        raise NotImplementedError

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any, **named: Any) -> Any:
        """As the Trainer's."""
        self.before_optimizer(dataloader)
        return super().set_initial_training_values(args, dataloader, *more, **named)  # type: ignore[misc]


class CallbackStateMixin:
    """Calls `after_callbacks` after a Trainer has recreated its callbacks from a checkpoint.

    `restore_callback_states_from_checkpoint` builds them from plain values, without what the Trainer has told them.
    """

    def after_callbacks(self) -> None:
        """Tell the callbacks what they need to know."""
        raise NotImplementedError

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # type: ignore[misc]  # the Trainer's, by the order of the bases
        self.after_callbacks()


def find_trainer(callback: TrainerCallback, state: TrainerState, named: Trainer | None = None) -> Trainer:
    """The Trainer that is calling a callback, identified by its state; several may hold one callback, one after another.

    Searches the live objects once per run, which takes 0.1 to 0.3 s.

    Args:
        callback: The callback.
        state: The state it was called with.
        named: A Trainer to try first.

    Raises:
        ValueError: If there is no such Trainer.
    """
    if named is not None and named.state is state:
        return named
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Trainer) and vars(candidate).get("state") is state:  # isinstance would load proxies
            return candidate
    raise ValueError(
        f"Expected a Trainer that calls {type(callback).__name__} with its own state, got none. Pass the callback to the "
        "Trainer, as callbacks=[…]."
    )


def trained_module(trainer: Trainer) -> nn.Module:
    """What the Trainer trains, without any engine's wrapper or compilation: a model, or a module around one."""
    module: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return module


def unwrapped(trainer: Trainer) -> PreTrainedModel:
    """The transformers model that the Trainer trains, without wrappers, except for a PeftModel, which is kept."""
    model: Any = inner_model(trained_module(trainer))
    return model


def save_model(trainer: Trainer, folder: str) -> None:
    """Save the model on all processes, without a push."""
    trainer.save_model(folder, _internal_call=True)


def finish_current_push(trainer: Trainer) -> None:
    """Wait until a background push that the Trainer started at a save has finished."""
    trainer._finish_current_push()


def prepare_inputs(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as the Trainer prepares it for its loss."""
    prepared: dict[str, Any] = trainer._prepare_inputs(batch)
    return prepared


def train_batch_size(trainer: Trainer) -> int:
    """Number of training examples per process and batch: what `auto_find_batch_size` found, if it is enabled."""
    return int(trainer._train_batch_size)
