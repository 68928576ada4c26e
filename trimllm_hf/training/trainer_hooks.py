"""transformers' Trainer: how a callback finds it, what it does for one, and the private methods to step in front of."""

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
    """What a Trainer does for a run that a callback cannot do; it tells its callback. The defaults: an unchanged Trainer.

    Attributes:
        freezes_layers: Whether it settles which layers train before an optimizer is made (`trainable_ratio`).
        calibration_set_aside: Whether it has taken the calibration examples out of the training set.
        trained_layers: The layers that train, in the base's numbering, where it froze the others.
        frozen: The parameters that it froze for that.
        teacher: The fingerprint of the model that teaches, where it trains by one.
    """

    freezes_layers: bool = False
    calibration_set_aside: bool = False
    trained_layers: list[int] | None = None
    frozen: list[weakref.ref[torch.nn.Parameter]] = field(default_factory=list)
    teacher: str | None = None


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


class CallbackStateMixin:
    """Calls `after_callbacks` when a Trainer has made its callbacks anew from a checkpoint, if it does.

    `restore_callback_states_from_checkpoint` makes them from plain values, without what the Trainer has told them.
    """

    def after_callbacks(self) -> None:
        """Tell the callbacks what they need to know."""
        raise NotImplementedError

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # type: ignore[misc]  # the Trainer's, by the order of the bases
        self.after_callbacks()


def find_trainer(callback: TrainerCallback, state: TrainerState, named: Trainer | None = None) -> Trainer:
    """The Trainer that is calling a callback, known by its state: one callback may be held by several, one after another.

    One walk over the live objects, 0.1 to 0.3 s, once a run.

    Args:
        callback: The callback.
        state: What it was called with.
        named: Tried first.

    Raises:
        ValueError: If there is no such Trainer.
    """
    if named is not None and named.state is state:
        return named
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Trainer) and vars(candidate).get("state") is state:  # isinstance would wake proxies
            return candidate
    raise ValueError(
        f"Expected a Trainer that calls {type(callback).__name__} with its own state, got none. Pass the callback to the "
        "Trainer, as callbacks=[…]."
    )


def trained_module(trainer: Trainer) -> nn.Module:
    """What the Trainer trains, without any engine's wrapper and not compiled: a model, or a module around one."""
    module: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return module


def unwrapped(trainer: Trainer) -> PreTrainedModel:
    """The transformers model that the Trainer trains, without whatever wraps it; a PeftModel keeps its own wrapper."""
    model: Any = inner_model(trained_module(trainer))
    return model


def save_model(trainer: Trainer, folder: str) -> None:
    """Save the model, by all processes, without a push."""
    trainer.save_model(folder, _internal_call=True)


def finish_current_push(trainer: Trainer) -> None:
    """Wait until a push that the Trainer made at a save, in the background, is through."""
    trainer._finish_current_push()


def prepare_inputs(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as the Trainer makes it ready for its loss."""
    prepared: dict[str, Any] = trainer._prepare_inputs(batch)
    return prepared


def train_batch_size(trainer: Trainer) -> int:
    """Examples a process trains on at a time: what `auto_find_batch_size` has found, where that is on."""
    return int(trainer._train_batch_size)
