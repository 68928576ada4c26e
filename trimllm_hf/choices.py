"""Which layers can go next: those with the lowest scores that the guard allows, and a rehearsal of a whole plan.

Most architectures allow any layer to go. Some tie a property to a layer's place (the only attention of a hybrid, the first
block of T5), and some repeat a pattern that their config cannot write out: there only a whole period can go, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .adapters import adapters_of, base_of
from .guard import rebuild
from .stack import find_stack
from .surgery import PlannedDrop, plan_drop

Planner = Callable[[list[int]], PlannedDrop]  # plans a drop of some positions, or raises a ValueError


def next_drop(plan: Planner, scores: Mapping[int, float], most: int, usual: int = 1) -> PlannedDrop:
    """Plan the drop of the least important layer that may go; where none may, of a few that lie next to one another.

    Args:
        plan: Plans a drop of some positions, or raises a ValueError.
        scores: The scores of the positions that are not protected; of equal ones the deepest goes first.
        most: How many layers may go at once.
        usual: How many had to go at once before: tried first.

    Raises:
        ValueError: If nothing can be dropped; what was said of the least important layer.
    """
    refusal: ValueError | None = None
    for size in sorted(range(1, most + 1), key=lambda size: (size != usual, size)):
        runs = [[*range(first, first + size)] for first in scores]
        possible = [run for run in runs if all(position in scores for position in run)]
        for run in sorted(possible, key=lambda run: (sum(scores[position] for position in run), -run[0])):
            try:
                return plan(run)
            except ValueError as error:
                refusal = refusal or error
    raise refusal or ValueError(f"Expected layers that may go, got only protected ones beside {sorted(scores)}.")


def rehearse(
    model: nn.Module, target: int, open_positions: Callable[[int], Iterable[int]], part: str | None
) -> dict[int, int]:
    """Drop layers of a copy without memory until it has `target` of them.

    Args:
        model: The model, which stays as it is.
        target: The depth to reach.
        open_positions: For a depth, the positions that are not protected.
        part: Of an encoder-decoder, the stack.

    Returns:
        For each depth on the way, how many layers have to go at once.

    Raises:
        ValueError: If there is no way to the target; with the least depth that can be reached.
    """
    base = base_of(model)
    copy: Any = rebuild(base, {}, part, adapters_of(base))
    sizes: dict[int, int] = {}
    size = 1
    while (depth := len(find_stack(copy, part))) > target:
        deepest_first = {position: -float(position) for position in open_positions(depth)}
        try:
            drop = next_drop(lambda layers: plan_drop(copy, layers, part=part), deepest_first, depth - target, size)
        except ValueError as error:
            reached = f"It can be trimmed to {depth}; then: " if sizes else ""
            raise ValueError(
                f"Expected a target that {type(base).__name__} can be trimmed to, got {target} layers. {reached}{error}"
            ) from error
        size = sizes[depth] = len(drop.positions)
        drop.apply()
    return sizes
