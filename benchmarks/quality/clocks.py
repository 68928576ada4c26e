"""What a run spends its time on, and how its loss falls: callbacks that measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

EVENTS = ("on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end")


class Calls(TrainerCallback):
    """Calls a function at each of the events at which a callback may drop layers."""

    def __init__(self, function: Callable[[], None]) -> None:
        for event in EVENTS:
            setattr(self, event, lambda *args, **kwargs: function())


class Stopwatch:
    """Seconds between `before` and `after`: put one in front of a callback, and the other behind."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self._started = clock, 0.0, 0.0
        self.before, self.after = Calls(self._start), Calls(self._stop)

    def _start(self) -> None:
        self._started = self.clock()

    def _stop(self) -> None:
        self.seconds += self.clock() - self._started


class Curve(TrainerCallback):
    """Measures the model after some steps (0: before the first), and counts the time that this takes apart.

    Args:
        steps: The steps.
        clock: Counts the seconds.
        measure: Gives a model's loss.
        say: Is told each point.
    """

    def __init__(
        self,
        steps: list[int],
        clock: Callable[[], float],
        measure: Callable[[Any], float],
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self.steps, self.clock, self.measure, self.say = set(steps), clock, measure, say
        self.points: list[dict[str, Any]] = []
        self.began = clock()
        self.seconds = 0.0  # that measuring took

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._point(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._point(state, kwargs["model"])

    def _point(self, state: Any, model: Any) -> None:
        if state.global_step not in self.steps:
            return
        start = self.clock()
        loss = self.measure(model)
        self.points.append(
            {
                "step": state.global_step,
                "tokens": int(state.num_input_tokens_seen),
                "seconds": start - self.began - self.seconds,
                "loss": loss,
            }
        )
        self.seconds += self.clock() - start
        self.say(self.points[-1])
