"""Logging of drops: a line of text, and values in the Trainer's own records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..importance import needs_data
from ..layer_map import LayerMap
from .strip_image import send_strip

SECONDS = "trim/seconds"  # duration of the run so far, in a record of the Trainer's log


class DropRecords(TrainerCallback):
    """Adds the depth to the Trainer's next record of a step or the run, and the elapsed time to each record of a step.

    A separate record would go through the `log` of a Trainer's subclass, which adds its accumulated metrics and resets them,
    so that they would be missing from the step's own record. This callback runs before a Trainer's other callbacks, so
    that all reporters see the same values. The time is only for `trainer_state.json`: trackers have their own.

    Args:
        started: When the run began, by `time.perf_counter`; for a resumed run, as if it had not been interrupted.
    """

    def __init__(self, started: float) -> None:
        self.pending: dict[str, float] = {}
        self.layer_map: LayerMap | None = None  # after the drops that are pending
        self.callbacks: Sequence[TrainerCallback] = ()  # these include the trackers
        self._started = started

    @property
    def seconds(self) -> float:
        """The duration of the run so far: training, scoring, drops and evaluation."""
        return round(time.perf_counter() - self._started, 2)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the pending values to the record and to the logs."""
        logs = kwargs["logs"]
        if "loss" in logs:  # not in those of evaluations, which become columns in a Trainer's own card
            state.log_history[-1][SECONDS] = self.seconds
        if self.pending and ("loss" in logs or "train_runtime" in logs):
            logs.update(self.pending)
            state.log_history[-1].update(self.pending)
            self.pending = {}
            if self.layer_map is not None and state.is_world_process_zero:
                send_strip(self.callbacks, self.layer_map, state.global_step)


def record_drops(trainer: Trainer, started: float) -> DropRecords:
    """Record drops in a Trainer's log, in place of an earlier run's records.

    Args:
        trainer: The Trainer.
        started: When this call of `train` began, by `time.perf_counter`.
    """
    before = [entry[SECONDS] for entry in trainer.state.log_history if SECONDS in entry]
    records, handler = DropRecords(started - max(before, default=0.0)), trainer.callback_handler
    others = [callback for callback in handler.callbacks if not isinstance(callback, DropRecords)]
    records.callbacks = others
    handler.callbacks = [records, *others]  # a new list: the old one may be in the middle of an iteration
    return records


def drop_log(
    layer_map: LayerMap, unit: str, step: int, margin: float | None, parameters: int
) -> tuple[str, dict[str, float]]:
    """The message about the last drop, and the values to log in TensorBoard and other trackers."""
    record, depth = layer_map.history[-1], layer_map.num_units(unit)
    score = max(record.scores or (float("nan"),))
    layers = f"layer{'s' * (len(record.dropped) > 1)} {', '.join(map(str, record.dropped))}"
    if record.sublayers is not None:
        named = zip(record.sublayers, record.dropped, strict=True)
        layers = ", ".join(f"the {kind} of layer {layer}" for kind, layer in named)
    to_next = "" if margin is None else f", margin to the next best {margin:.4g}"
    line = (
        f"Step {step}: dropped {layers} of {layer_map.base_num_layers} ({record.importance} {score:.4f}{to_next}); "
        f"{depth} layers, {parameters:,} parameters left."
    )
    logs = {"trim/num_layers": depth, "trim/parameters": parameters, "trim/score": score}
    return line, logs if margin is None else {**logs, "trim/margin": margin}


def dropped_names(layer_map: LayerMap) -> list[str]:
    """The layers of the last drop, by their names in the scores: "3", or "attention 3"."""
    record = layer_map.history[-1]
    kinds = record.sublayers or [None] * len(record.dropped)
    return [str(layer) if kind is None else f"{kind} {layer}" for layer, kind in zip(record.dropped, kinds, strict=True)]


def scoring(importance: str, names: Sequence[str], scores: torch.Tensor, spread: torch.Tensor | None) -> dict[str, Any]:
    """A scoring in plain values, rounded to the digits visible in a figure, since every save of the run writes them all.

    Args:
        importance: The score that was used. The scores of a rule that uses no data are not kept.
        names: The layers, in the base's numbering.
        scores: The score of each layer; for windows, that of each window, by its first layer.
        spread: The standard error of each over the batches, if there is one.
    """

    def short(values: torch.Tensor | None, digits: int) -> dict[str, float]:
        kept = values.tolist() if values is not None and needs_data(importance) else []
        return {name: float(f"{value:.{digits}g}") for name, value in zip(names, kept, strict=False)}

    return {"importance": importance, "scores": short(scores, 6), "spread": short(spread, 2)}
