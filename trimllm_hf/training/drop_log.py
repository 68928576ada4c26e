"""What is told of a drop: a line for a person, and values in the Trainer's own records."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layer_map import LayerMap


class DropRecords(TrainerCallback):
    """Adds the depth to the next record that the Trainer makes of a step, or of the run.

    A record of our own would go through the `log` of a Trainer's subclass, which adds the metrics that it has accumulated
    and forgets them: the step's own record would be left without. It stands before a Trainer's other callbacks, so that
    all that report see the same.
    """

    def __init__(self) -> None:
        self.pending: dict[str, float] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what is pending to the record, and to the log's."""
        logs = kwargs["logs"]
        if self.pending and ("loss" in logs or "train_runtime" in logs):
            logs.update(self.pending)
            state.log_history[-1].update(self.pending)
            self.pending = {}


def record_drops(trainer: Trainer) -> DropRecords:
    """Have drops recorded in a Trainer's log; a run before is recorded no more."""
    records, handler = DropRecords(), trainer.callback_handler
    others = [callback for callback in handler.callbacks if not isinstance(callback, DropRecords)]
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
