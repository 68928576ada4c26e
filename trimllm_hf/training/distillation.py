"""Distillation: the untrimmed model is the teacher of the trimmed one.

The loss is (1 - w) * the task's loss + w * KL(teacher || student), with w = `distill_weight`; the KL divergence is that of
Hinton et al. (arXiv 1503.02531, §2): between the distributions softened by a temperature T, times T². It is computed at the
positions that the task's loss covers, and has the same divisor: the number of labels in the whole accumulated batch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer

from ..engines import engine_class, refuse_shards
from ..importance.metrics import is_causal
from ..surgery.adapters import base_of
from .config import TrimConfig
from .trainer_hooks import TrainerSupport, unwrapped

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T² * KL(teacher || student), summed over positions.

    Args:
        student: Logits of shape (positions, classes).
        teacher: Logits of the same shape.
        temperature: T, by which both are divided.
    """
    of_student, of_teacher = (log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return kl_div(of_student, of_teacher, reduction="sum", log_target=True) * temperature**2


def labelled_positions(logits: torch.Tensor, inputs: Mapping[str, Any], causal: bool) -> torch.Tensor:
    """The positions that the task's loss covers: a mask of the shape of `logits` without its last dimension.

    Args:
        logits: Of shape (batch, tokens, classes), or (batch, classes).
        inputs: The batch, with its labels; -100 means no label.
        causal: Whether each position predicts the label of the next one.

    Raises:
        ValueError: If the labels are not classes, or do not fit.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        got = "none" if labels is None else f"{tuple(labels.shape)} of {labels.dtype}"
        raise ValueError(
            f"Expected a class as the label of each of the logits {tuple(logits.shape)} for distill_weight, got {got}. "
            "Set distill_weight=0 for a task like this."
        )
    mask: torch.Tensor = labels != -100
    if causal and "shift_labels" not in inputs:
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask


class Teacher:
    """A frozen copy of a model, in half precision if the device supports it.

    Args:
        model: The model before it is prepared and trimmed. It is not changed.

    Raises:
        ValueError: If the model is already sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_shards(model)
        self.fingerprint = fingerprint(model)
        dtype = half_precision(next(model.parameters()).device)
        copies: dict[int, Any] = {}
        for parameter in model.parameters():
            value = parameter.detach()
            value = value.to(dtype) if dtype is not None and value.dtype == torch.float32 else value.clone()
            copies[id(parameter)] = nn.Parameter(value, requires_grad=False)
        self.model: Any = copy.deepcopy(model, copies).eval()  # buffers keep their precision
        config = base_of(self.model).config
        self.needs_labels = config.is_encoder_decoder  # it derives its decoder's inputs from them
        config.get_text_config(decoder=True).use_cache = False
        self.placed = False

    def logits(self, accelerator: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The teacher's logits for a batch, which is not changed."""
        if not self.placed:
            self.model = engine_class(accelerator).place_frozen(accelerator, self.model)
            self.placed = True
        without = () if self.needs_labels else ("labels", "shift_labels")
        given = {name: value for name, value in inputs.items() if name not in without}
        with torch.no_grad():
            logits: torch.Tensor = self.model(**given).logits
        return logits


class DistillationMixin(_Base):
    """A Trainer with an optional teacher."""

    teacher: Teacher | None = None
    trim_config: TrimConfig
    trim_support: TrainerSupport

    def take_teacher(self, model: nn.Module) -> None:
        """Copy the model as the teacher, if one is requested, before it is trimmed or trained."""
        if self.trim_config.distill_weight > 0:
            self.teacher = Teacher(model)
            self.trim_support.teacher = self.teacher.fingerprint

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """As the Trainer's, plus the distillation loss during training; in evaluation it is the task's loss alone."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        given = dict(inputs)  # a label smoother removes the labels
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if logits is None:
            raise ValueError(
                "Expected a model that returns its logits for distill_weight, got none: the loss was computed without them. "
                "Set use_liger_kernel=False, or distill_weight=0."
            )
        causal = is_causal(unwrapped(self))
        mask = labelled_positions(logits, given, causal)
        teacher = self.teacher.logits(self.accelerator, given)
        divergence = kl_divergence(logits[mask], teacher.to(logits.device)[mask], self.trim_config.distill_temperature)
        weight = self.trim_config.distill_weight
        combined = (1 - weight) * loss + weight * divergence / self._labels_in_step(mask, num_items_in_batch)
        return (combined, outputs) if return_outputs else combined

    def _labels_in_step(self, mask: torch.Tensor, num_items_in_batch: Any) -> Any:
        """The divisor of the task's loss in the Trainer."""
        if num_items_in_batch is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return mask.sum().clamp(min=1)  # a mean, which the Trainer divides by the number of accumulated batches
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return num_items_in_batch / processes  # gradients are averaged over the processes


def refuse_another_teacher(trainer: Trainer, support: TrainerSupport, config: TrimConfig, saved: str | None) -> None:
    """Refuse to train without a requested teacher, or to resume with another one than the run began with.

    Args:
        trainer: The Trainer.
        support: Its support record, with the teacher.
        config: The settings.
        saved: The fingerprint in the checkpoint that is resumed from; None for a new run.

    Raises:
        ValueError: With what to do.
    """
    if config.distill_weight > 0 and support.teacher is None:
        raise ValueError(
            f"Expected a TrimTrainer for distill_weight={config.distill_weight}, got {type(trainer).__name__}, whose loss a "
            "callback cannot change. Use TrimTrainer, or class MyTrainer(TrimTrainerMixin, YourTrainer)."
        )
    if support.teacher is not None and saved not in (None, support.teacher):
        raise ValueError(
            "Expected the model that this run began with, whole and untrained, as the teacher, got another one: weights or "
            "depth differ. Make the Trainer with the same base model, not with a checkpoint of the run."
        )


def half_precision(device: torch.device) -> torch.dtype | None:
    """The 16-bit dtype for a device; None if it would not be faster."""
    if device.type == "cpu":
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and first values of a model's parameters, by which a resumed run identifies its teacher."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:256].float().cpu().contiguous()
        found.update(f"{name}{tuple(parameter.shape)}".encode())
        found.update(values.numpy().tobytes())
    return found.hexdigest()[:16]
