"""The share of a run that may be spent on choosing layers, and what it allows."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.05  # default share of a run that may be spent
STEP = 3  # cost of a training step in forward passes: one for forward, two for backward
LOOKS = 3.5  # models that a lazy scan evaluates per layer after the first, about: 15 of 30 took 44 and, among 10, 59
RANKED = 32  # calibration examples that suffice for a ranking by block influence, a mean over all their tokens
JUDGED = 16  # calibration examples on which sets of layers are compared, and repairs; if they cannot tell, it matters little
SETS = 4  # sets in fewer gaps that are compared with that of the ranking, at most
LEAST = 8  # calibration examples below which a scan is not worth its passes
# what a budget can allow, the best first: candidates of a lazy scan (None: all), and the share of the examples
SCANS = ((None, 1.0), (10, 1.0), (4, 1.0), (4, 0.5))


@dataclass(frozen=True)
class SelectionPlan:
    """How layers are chosen.

    Attributes:
        examples: Calibration examples for a ranking by block influence.
        sets: How many sets in fewer gaps are compared with that of the ranking, at most.
        scanned: Calibration examples for a lazy scan; 0: no scan.
        width: How many layers of the lowest block influence it evaluates; None: all.
        passes: The cost, in forward passes of the whole model over one example.
        affordable: The budget, in the same unit.
    """

    examples: int
    sets: int
    scanned: int
    width: int | None
    passes: float
    affordable: float

    def __str__(self) -> str:
        said = f"block influence on {self.examples} examples"
        if self.sets:
            said += f", beside sets in fewer gaps ({self.sets} at most)"
        if self.scanned:
            among = "" if self.width is None else f" among the {self.width} likeliest"
            said += f", beside a lazy scan{among} on {self.scanned}"
        return f"{said}: about {self.passes:.0f} of {self.affordable:.0f} affordable passes over an example"


def plan_selection(share: float | None, run_examples: float, examples: int, depth: int, drops: int) -> SelectionPlan:
    """The best way to choose layers that a run can afford.

    Args:
        share: Share of the run that may be spent; None: `SHARE`, and in any case what ranking on `RANKED` examples and
            comparing with `SETS` sets costs.
        run_examples: Number of training examples of the run, divided by the number of selections.
        examples: Calibration examples available.
        depth: Number of layers that may be dropped.
        drops: How many of them are dropped at that time.

    Raises:
        ValueError: If not even a pass over one example is affordable; with the arithmetic.
    """
    judged = min(examples, JUDGED)
    if share is None:
        affordable = max(float(min(examples, RANKED) + (1 + SETS) * judged), SHARE * STEP * run_examples)
    elif (affordable := share * STEP * run_examples) < 1:
        raise ValueError(
            "Expected a selection_budget that affords a pass over a calibration example each time that layers are chosen, "
            f"got {share:g} of {run_examples:g} training examples for each time, of {STEP} passes each: {affordable:.2g} "
            f"passes. Raise it to {1 / (STEP * run_examples):.2g}, train longer, drop less often, or name an importance "
            "that takes no passes ('last')."
        )
    ranked = min(examples, RANKED, int(affordable))
    sets = max(0, min(SETS, int((affordable - ranked) / judged) - 1)) if drops > 1 else 0
    compared = float(ranked + (1 + sets) * judged if sets else ranked)
    left = 1 - (drops - 1) / (2 * depth)  # share of the layers that remain, on average over the drops
    for width, part in SCANS:
        scanned = int(examples * part)
        first = 1 + depth / 2 if width is None else min(width, depth)
        passes = compared + scanned * (1 + first + LOOKS * (drops - 1) * left)
        if scanned >= LEAST and passes <= affordable:
            return SelectionPlan(ranked, sets, scanned, width, passes, affordable)
    return SelectionPlan(ranked, sets, 0, None, compared, affordable)
