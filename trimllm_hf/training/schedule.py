"""The plan of when to drop how many layers, made once from the settings and the length of the run."""

from __future__ import annotations

from collections import Counter

from .config import TrimConfig

WARM_UP = 0.05  # share of the steps before the first drop of "spread": a scan while the loss is at chance level ranks noise
HEALING = 0.75  # share of the steps after the last drop of "spread": late drops do worse than early ones

Plan = dict[int, int]  # optimizer step (0: before the first) -> layers to drop after it


def plan_drops(config: TrimConfig, num_layers: int, target: int, max_steps: int, steps_per_epoch: int | None = None) -> Plan:
    """Plan after which optimizer steps to drop how many layers.

    Args:
        config: The settings; `drop_every`, `layers_per_drop` and `healing_ratio` are used.
        num_layers: Depth at the start of the run.
        target: Depth to reach.
        max_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps per epoch; None if the length of the data is unknown.

    Returns:
        For each step with a drop, the number of layers; they add up to `num_layers - target`.

    Raises:
        ValueError: If the target cannot be reached with `healing_ratio` of the steps (at least one) left for healing; the
            message has the arithmetic.
    """
    to_drop = num_layers - target
    if to_drop <= 0:
        return {}
    sizes = [config.layers_per_drop] * (to_drop // config.layers_per_drop)
    if to_drop % config.layers_per_drop:
        sizes.append(to_drop % config.layers_per_drop)
    schedule = config.schedule
    if schedule == "once":
        return {0: to_drop}
    if schedule == "spread":
        steps = _spread(len(sizes), max_steps, last_step(config, max_steps))
        every = f"'spread' (steps {steps[0]} to {steps[-1]})"
    else:
        if schedule == "epoch":
            if steps_per_epoch is None:
                raise ValueError(
                    "Expected a training set of known length for drop_every='epoch', got a streaming one. Set "
                    "drop_every to a number of steps."
                )
            interval = steps_per_epoch
        else:
            interval = int(schedule)
        steps = [interval * (i + 1) for i in range(len(sizes))]
        every = f"every {interval} steps"
    if steps[-1] > (last := last_step(config, max_steps)):
        healing = "a step" if config.healing_ratio is None else f"healing_ratio={config.healing_ratio} of the steps"
        raise ValueError(
            f"Expected a plan that reaches {target} layers with {healing} left to heal, got {num_layers} - {target} = "
            f"{to_drop} layers to drop, {config.layers_per_drop} at a time: {len(sizes)} drops, {every}: the last one "
            f"after step {steps[-1]}, but the run has {max_steps} steps, and {last} is the last to drop after. Train "
            "longer, drop more often (drop_every), or more at a time (layers_per_drop)."
        )
    plan: Counter[int] = Counter()
    for step, size in zip(steps, sizes, strict=True):
        plan[step] += size
    return dict(plan)


def last_step(config: TrimConfig, max_steps: int) -> int:
    """The last optimizer step after which a layer may be dropped: the rest, at least one step, is for healing."""
    healing = config.healing_ratio
    if healing is None:
        healing = HEALING if config.schedule == "spread" else 0.0
    return min(max_steps - 1, max(1, round((1 - healing) * max_steps)))


def layers_due(plan: Plan, step: int, dropped: int) -> int:
    """How many layers are due now: those planned up to `step`, minus those that this run has already dropped."""
    return max(0, sum(count for planned, count in plan.items() if planned <= step) - dropped)


def _spread(drops: int, max_steps: int, last: int) -> list[int]:
    """The steps of `drops` evenly spaced drops in the window of "spread"."""
    first = min(max(1, round(WARM_UP * max_steps)), max(1, last))
    if drops == 1:
        return [first]
    return [first + (max(first, last) - first) * i // (drops - 1) for i in range(drops)]
