"""Calibration batches as a Trainer sees them: the inputs it passes to its model, and the loss it computes for them."""

from __future__ import annotations

import copy
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from ..engines import ProcessGroup
from ..importance.calibration import CHOICE_COLUMNS, Batch, calibration_batches, model_inputs
from ..importance.calls import PLAIN
from ..importance.evaluation import collect_metric, to_be_scored
from ..importance.forwards import Forward, replaced_forwards
from ..importance.metrics import Loss, Metric, Predictions
from ..surgery.adapters import base_of
from ..utils import evaluating
from .trainer_hooks import prepare_inputs, train_batch_size, trained_module, unwrapped

CONTAINERS = (dict, list, set, deque)


@dataclass(frozen=True)
class TrainerBatch:
    """A calibration batch.

    Attributes:
        collated: The output of the Trainer's collator, with the number of its examples.
        inputs: The inputs that the Trainer passes to its model for it, and the columns that a scan by choices uses.
        has_loss: Whether the Trainer's loss is a function of it; it is not if the Trainer generates its training data.
    """

    collated: Batch
    inputs: Batch
    has_loss: bool


class TrainerBatches:
    """This process's calibration batches, and a filler batch for a process whose share is empty.

    Args:
        trainer: The Trainer.
        model: Its unwrapped model.
        examples: The calibration examples, in the same order on each process.
        dataloader: The training data loader, which defines how examples become batches.
        rank: This process's number.
        world_size: Number of processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        examples: Sequence[Any],
        dataloader: Any,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        collate: Callable[..., Any] = getattr(dataloader, "collate_fn", None) or trainer.data_collator
        held = getattr(dataloader, "dataset", None)
        transformed = (getattr(held, "format", None) or {}).get("type") == "custom"  # its rows have other columns
        columns = None if transformed else getattr(held, "column_names", None)
        size = train_batch_size(trainer)
        (filler,) = calibration_batches(examples[:1], collate, 1, columns)
        collated = calibration_batches(examples, collate, size, columns, rank, world_size)
        most = -(-len(examples[::world_size]) // size)  # number of batches of the first process, which has the most
        numbers = [min(size, len(examples[rank::world_size]) - start * size) for start in range(len(collated))]
        # the loss of a sharded model is collective: each process computes the same number of batches
        with to_be_scored(model):
            asked = [as_called(trainer, model, *pair) for pair in zip(collated, numbers, strict=True)]
            fillers = [as_called(trainer, model, filler, 1) for _ in range(most - len(collated) + 1)]
        self.collated, self.inputs = [batch.collated for batch in asked], [batch.inputs for batch in asked]
        self.filler, self.filler_inputs = fillers[0].collated, fillers[0].inputs
        self.have_loss = all(batch.has_loss for batch in (*asked, *fillers))

    def first(self) -> TrainerBatches:
        """The first batch of each process."""
        part = copy.copy(self)
        part.collated, part.inputs = self.collated[:1], self.inputs[:1]
        return part


def as_called(trainer: Trainer, model: nn.Module, collated: Any, num_examples: int) -> TrainerBatch:
    """The inputs that a Trainer passes to its model for a collated batch, found by running its loss up to that call.

    A Trainer that generates its own training data (GRPO) has prompts in its batches; they are the inputs then.

    Raises:
        ValueError: If the Trainer cannot compute a loss for it.
    """
    wrapped = {"batch": collated, "num_examples": num_examples}
    if isinstance(collated, Mapping):
        inputs = _call(trainer, model, model_inputs(dict(collated)))
        values = inputs.values()
        if any(isinstance(value, torch.Tensor) for value in values) and all(
            isinstance(value, (torch.Tensor, *PLAIN)) for value in values
        ):
            of_choices = {name: collated[name] for name in CHOICE_COLUMNS if name in collated}
            if of_choices and "labels" in collated:
                of_choices["labels"] = collated["labels"]  # a label smoother removes them
            return TrainerBatch(wrapped, send_to_device({**inputs, **of_choices}, "cpu"), True)
    return TrainerBatch(wrapped, _prompts(trainer, collated), False)


class _Called(Exception):
    def __init__(self, inputs: Batch) -> None:
        super().__init__()
        self.inputs = inputs


def _call(trainer: Trainer, model: nn.Module, batch: Batch) -> Batch:
    """The first call of the model with gradients; a call without gradients is that of a reference model."""
    names = tuple(inspect.signature(base_of(model).forward).parameters)  # before it is replaced

    def stop(*args: Any, **kwargs: Any) -> None:
        if torch.is_grad_enabled():
            raise _Called({**dict(zip(names, args, strict=False)), **kwargs})

    def stopping(_: int, forward: Forward) -> Forward:  # some call `forward` directly, bypassing all hooks
        def stop_or_run(*args: Any, **kwargs: Any) -> Any:
            stop(*args, **kwargs)
            return forward(*args, **kwargs)

        return stop_or_run

    handle = model.register_forward_pre_hook(lambda _, args, kwargs: stop(*args, **kwargs), with_kwargs=True, prepend=True)
    try:
        with torch.enable_grad(), without_trace(trainer), replaced_forwards([model], stopping):
            trainer.compute_loss(trained_module(trainer), prepare_inputs(trainer, batch))
    except _Called as call:
        # without arguments for a forward that it has replaced: TRL's own head, which returns no logits
        known = {*inspect.signature(type(base_of(model)).forward).parameters, *batch}
        return {name: value for name, value in call.inputs.items() if name in known}
    except Exception as error:
        raise ValueError(
            f"Expected calibration examples of which {type(trainer).__name__} can compute a loss, got {sorted(batch)} and "
            f"{type(error).__name__}: {error} Process them as the training set is, or leave calibration_dataset out."
        ) from error
    finally:
        handle.remove()
    plain = ("input_ids", "attention_mask", "inputs_embeds", "pixel_values", "labels")
    return {name: batch[name] for name in plain if name in batch}  # its loss calls parts of the model


def _prompts(trainer: Trainer, collated: Any) -> Batch:
    """The prompts of a batch, tokenized."""
    prompts = collated.get("prompt") if isinstance(collated, Mapping) else [row.get("prompt") for row in collated]
    processor: Any = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    if not prompts or None in prompts or tokenizer is None:
        raise ValueError(
            f"Expected calibration examples that {type(trainer).__name__} calls its model with, or with a 'prompt' and a "
            f"processing_class, got {collated if isinstance(collated, list) else sorted(collated)!r:.200}. Use a score that "
            "runs nothing, like 'last'."
        )
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def trainer_loss(trainer: Trainer) -> Loss:
    """A Trainer's own loss, the mean over a batch's examples, weighted as in its evaluation."""

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
        inputs = prepare_inputs(trainer, model_inputs(dict(batch["batch"])))
        with trainer.compute_loss_context_manager():
            mean: Any = trainer.compute_loss(trained_module(trainer), inputs)
            return mean, float(batch["num_examples"])

    return loss


def computes_own_loss(trainer: Trainer, model: nn.Module, data: TrainerBatches, process_group: ProcessGroup) -> bool:
    """Whether the Trainer's loss equals the one that the model computes for the same inputs, on each calibration batch.

    More is known about the model's own loss: it is the mean over labels, and what follows the blocks need run only at these.
    """
    labelled = all(batch.get("labels") is not None for batch in (*data.inputs, data.filler_inputs))
    if not all(process_group.gather(labelled and data.have_loss)):
        return False

    def of_model(model: nn.Module, batch: Batch) -> tuple[Any, float]:
        return getattr(model(**model_inputs(batch)), "loss", None), 1.0

    def means(batches: list[Batch], filler: Batch, loss: Any) -> list[float]:
        metric = Metric(
            "loss", lambda model, output, batch: math.nan if output[0] is None else float(output[0]), sum, run=loss
        )
        return collect_metric(model, batches, metric, process_group, filler)

    own = means(data.inputs, data.filler_inputs, of_model)
    theirs = means(data.collated, data.filler, trainer_loss(trainer))
    return all(
        math.isclose(one, other, rel_tol=1e-4) or (math.isnan(one) and math.isnan(other))  # a batch without labels
        for one, other in zip(own, theirs, strict=True)
    )


def predictions(trainer: Trainer) -> Callable[[nn.Module, Batch], Predictions]:
    """What a Trainer's evaluation passes to `compute_metrics`: loss, logits and labels."""

    def predict(model: nn.Module, batch: Batch) -> Predictions:
        inputs = model_inputs(dict(batch["batch"]))
        return trainer.prediction_step(trained_module(trainer), inputs, prediction_loss_only=False)

    return predict


def main_input(trainer: Trainer) -> Callable[[Batch], Any]:
    """The inputs that a Trainer's evaluation adds if `include_for_metrics` requests them."""
    name = getattr(unwrapped(trainer), "main_input_name", "input_ids")
    return lambda batch: batch["batch"][name]


@contextmanager
def without_trace(trainer: Trainer) -> Iterator[None]:
    """Restore afterwards what a Trainer records when it computes a loss (metrics, counters, its log)."""
    attributes = vars(trainer)
    had = dict(attributes)
    copies = {
        name: _copied(value) for name, value in had.items() if type(value) in CONTAINERS and not name.endswith("dataset")
    }  # lists of examples are only read
    trainer.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        with evaluating([trained_module(trainer)]):  # including modules around a model
            yield
    finally:
        attributes.clear()
        attributes.update(had)
        for name, before in copies.items():
            _refill(had[name], before)


def _copied(value: Any) -> Any:
    """A copy of a container and the containers in it; everything else is the same object."""
    if isinstance(value, dict):
        made = value.copy()  # a defaultdict keeps its default factory
        made.update({key: _copied(item) for key, item in value.items()})
        return made
    if isinstance(value, deque):
        return deque(map(_copied, value), value.maxlen)
    if type(value) in (list, set):
        return type(value)(map(_copied, value))
    return value


def _refill(container: Any, before: Any) -> None:
    container.clear()
    container.extend(before) if isinstance(container, list | deque) else container.update(before)
