"""When to drop how many layers: a plan made once, from the settings and the length of the run."""

from __future__ import annotations

from collections import Counter

from .config import TrimConfig

WARM_UP = 0.05  # share of the steps before the first drop of "auto": a scan while the loss is at chance ranks noise
LAST_DROP = 0.25  # share of the steps at which "auto" drops last: late drops lose to early ones, the rest heals

Plan = dict[int, int]  # optimizer step (0: before the first) -> layers to drop when it is done


def plan_drops(config: TrimConfig, num_layers: int, target: int, max_steps: int, steps_per_epoch: int | None = None) -> Plan:
    """After which optimizer steps to drop how many layers.

    Args:
        config: The settings; `drop_every` and `layers_per_drop` count here.
        num_layers: Depth at the start of the run.
        target: Depth to reach.
        max_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch; None where the length of the data is not known.

    Returns:
        For each step with a drop, the number of layers; they add up to `num_layers - target`.

    Raises:
        ValueError: If the target cannot be reached with at least one step left to heal; with the arithmetic.
    """
    to_drop = num_layers - target
    if to_drop <= 0:
        return {}
    sizes = [config.layers_per_drop] * (to_drop // config.layers_per_drop)
    if to_drop % config.layers_per_drop:
        sizes.append(to_drop % config.layers_per_drop)
    if config.drop_every == "once":
        return {0: to_drop}
    if config.drop_every == "auto":
        steps = _spread(len(sizes), max_steps)
        every = "'auto' (5% to 25% of the steps)"
    else:
        if config.drop_every == "epoch":
            if steps_per_epoch is None:
                raise ValueError(
                    "Expected a training set of known length for drop_every='epoch', got a streaming one. Set "
                    "drop_every to a number of steps."
                )
            interval = steps_per_epoch
        else:
            interval = int(config.drop_every)
        steps = [interval * (i + 1) for i in range(len(sizes))]
        every = f"every {interval} steps"
    if steps[-1] >= max_steps:
        raise ValueError(
            f"Expected a plan that reaches {target} layers with a step left to heal, got {num_layers} - {target} = "
            f"{to_drop} layers to drop, {config.layers_per_drop} at a time: {len(sizes)} drops, {every}: the last one "
            f"after step {steps[-1]}, but the run has {max_steps} steps. Train longer, drop more often "
            "(drop_every), or more at a time (layers_per_drop)."
        )
    plan: Counter[int] = Counter()
    for step, size in zip(steps, sizes, strict=True):
        plan[step] += size
    return dict(plan)


def layers_due(plan: Plan, step: int, dropped: int) -> int:
    """How many layers have to go now: those planned up to `step`, less those that this run has dropped already."""
    return max(0, sum(count for planned, count in plan.items() if planned <= step) - dropped)


def _spread(drops: int, max_steps: int) -> list[int]:
    """Steps of `drops` drops at even distances in the window of "auto"."""
    first = max(1, round(WARM_UP * max_steps))
    last = max(first, round(LAST_DROP * max_steps))
    if drops == 1:
        return [first]
    return [first + (last - first) * i // (drops - 1) for i in range(drops)]
