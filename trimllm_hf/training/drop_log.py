"""What is told of a drop: a line for a person, and values in the Trainer's own records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..importance import needs_data
from ..layer_map import LayerMap
from .strip_image import send_strip

SECONDS = "trim/seconds"  # of training, in a record of the Trainer's log


class DropRecords(TrainerCallback):
    """Adds the depth to the next record that the Trainer makes of a step or the run, and to each of a step how long it took.

    A record of our own would go through the `log` of a Trainer's subclass, which adds the metrics that it has accumulated
    and forgets them: the step's own record would be left without. It stands before a Trainer's other callbacks, so that
    all that report see the same. The time is for `trainer_state.json` alone: trackers have their own.

    Args:
        started: When the run began, by `time.perf_counter`; one that is resumed, as if it had not been interrupted.
    """

    def __init__(self, started: float) -> None:
        self.pending: dict[str, float] = {}
        self.layer_map: LayerMap | None = None  # after the drops that are pending
        self.callbacks: Sequence[TrainerCallback] = ()  # among which the trackers are
        self._started = started

    @property
    def seconds(self) -> float:
        """How long the run has taken so far: training, scoring, drops and evaluation."""
        return round(time.perf_counter() - self._started, 2)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is pending to the record, and to the log's."""
        logs = kwargs["logs"]
        if "loss" in logs:  # not in those of evaluations, of which a Trainer's own card makes columns
            state.log_history[-1][SECONDS] = self.seconds
        if self.pending and ("loss" in logs or "train_runtime" in logs):
            logs.update(self.pending)
            state.log_history[-1].update(self.pending)
            self.pending = {}
            if self.layer_map is not None and state.is_world_process_zero:
                send_strip(self.callbacks, self.layer_map, state.global_step)


def record_drops(trainer: Trainer, started: float) -> DropRecords:
    """Have drops recorded in a Trainer's log; a run before is recorded no more.

    Args:
        trainer: The Trainer.
        started: When this call of `train` began, by `time.perf_counter`.
    """
    before = [entry[SECONDS] for entry in trainer.state.log_history if SECONDS in entry]
    records, handler = DropRecords(started - max(before, default=0.0)), trainer.callback_handler
    others = [callback for callback in handler.callbacks if not isinstance(callback, DropRecords)]
    records.callbacks = others
    handler.callbacks = [records, *others]  # a new list: the old one may be walked through just now
    return records


def drop_log(
    layer_map: LayerMap, unit: str, step: int, margin: float | None, parameters: int
) -> tuple[str, dict[str, float]]:
    """What to tell of the last drop, and to log: to a person, and to TensorBoard and its like."""
    record, depth = layer_map.history[-1], layer_map.num_units(unit)
    score = max(record.scores or (float("nan"),))
    layers = f"layer{'s' * (len(record.dropped) > 1)} {', '.join(map(str, record.dropped))}"
    if record.sublayers is not None:
        named = zip(record.sublayers, record.dropped, strict=True)
        layers = ", ".join(f"the {kind} of layer {layer}" for kind, layer in named)
    to_next = "no other candidate" if margin is None else f"margin to the next best {margin:.4g}"
    line = (
        f"Step {step}: dropped {layers} of {layer_map.base_num_layers} ({record.importance} {score:.4f}, {to_next}); "
        f"{depth} layers, {parameters:,} parameters left."
    )
    logs = {"trim/num_layers": depth, "trim/parameters": parameters, "trim/score": score}
    return line, logs if margin is None else {**logs, "trim/margin": margin}


def dropped_names(layer_map: LayerMap) -> list[str]:
    """What the last drop took, by the names that scores have: "3", or "attention 3"."""
    record = layer_map.history[-1]
    kinds = record.sublayers or [None] * len(record.dropped)
    return [str(layer) if kind is None else f"{kind} {layer}" for layer, kind in zip(record.dropped, kinds, strict=True)]


def scoring(importance: str, names: Sequence[str], scores: torch.Tensor, spread: torch.Tensor | None) -> dict[str, Any]:
    """A scoring in plain values, with no more digits than a picture shows: each save of the run writes them all.

    Args:
        importance: What was scored by. A rule that looks at no data has no scores worth keeping.
        names: The layers, in the base's numbering.
        scores: Of each layer; of windows, of each by its first layer.
        spread: The standard error of each over the batches, where there is one.
    """

    def short(values: torch.Tensor | None, digits: int) -> dict[str, float]:
        kept = values.tolist() if values is not None and needs_data(importance) else []
        return {name: float(f"{value:.{digits}g}") for name, value in zip(names, kept, strict=False)}

    return {"importance": importance, "scores": short(scores, 6), "spread": short(spread, 2)}
