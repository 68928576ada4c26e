"""The ways to a fine-tuned model of fewer layers that are compared: for each, what it does to a run.

A method is a `Method`: the settings of `TrimConfig` (none for a model that loses nothing), and what else it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        says: What the table calls it.
        trim: Settings of `TrimConfig` beside the target; None: nothing is trimmed during training.
        warm_up: Share of the steps before the first drop of `drop_every="spread"`, where it is not the default.
        evenly: Whether the drops are spread evenly over the run, one layer each (TrimLLM's schedule).
        by_choices: Whether layers are scored by the accuracy on the calibration questions.
        time_of: The method whose CPU time it gets, at the same seed: it trains for as many steps as fit in it.
        from_scratch: Whether it begins as a random model of the target's depth.
        only_head: Whether only the head, the last norm and the last three blocks train (arXiv 2411.15558).
        repaired: Whether the cut of `only_head` is repaired.
    """

    says: str
    trim: dict[str, Any] | None = None
    warm_up: float | None = None
    evenly: bool = False
    by_choices: bool = False
    time_of: str | None = None
    from_scratch: bool = False
    only_head: bool = False
    repaired: bool = False


ONCE: dict[str, Any] = {"drop_every": "once", "repair": "none"}
SCAN: dict[str, Any] = {"importance": "sensitivity", "drop_every": "spread", "repair": "none"}
INFLUENCE = {"importance": "block_influence", **ONCE}
RANKED = {**INFLUENCE, "rescore": False}
LAST = {"importance": "last", "protect_last": 0, **ONCE}
PUBLISHED = {
    "scan_metric": "choice_accuracy",
    "tie_breaker": "activation_norm",
    "warm_up_importance": "none",
    "repair": "none",
}

METHODS: dict[str, Method] = {
    "full": Method("full depth"),
    "default": Method("`TrimConfig`'s defaults", {}),
    "default-plain": Method("`TrimConfig`'s defaults, not repaired", {"repair": "none"}),
    "default-distilled": Method("`TrimConfig`'s defaults, distilled from the base", {"distill_weight": 0.5}),
    "scan-quarter": Method("scan by loss, drops from 5% to 25% of the steps", SCAN),
    "scan-quarter-distilled": Method("the same, distilled from the base", {**SCAN, "distill_weight": 0.5}),
    "trimllm": Method(
        "TrimLLM: sublayers, scan by accuracy and activation norm, one at a time, evenly, all train",
        {"unit": "sublayer", **PUBLISHED},
        evenly=True,
        by_choices=True,
    ),
    "trimllm-quarter": Method(
        "TrimLLM with blocks, a quarter of them trains", {"trainable_ratio": 0.25, **PUBLISHED}, evenly=True, by_choices=True
    ),
    "scan-early": Method("scan, drops from 5% to 10%", {**SCAN, "healing_ratio": 0.9}),
    "scan-spread": Method("scan, drops from 5% to 70%", {**SCAN, "healing_ratio": 0.3}),
    "scan-late": Method("scan, drops from 50% to 90%", {**SCAN, "healing_ratio": 0.1}, warm_up=0.5),
    "scan-once": Method("scan, all before the first step", {**SCAN, "warm_up_importance": "none", **ONCE}),
    "scan-once-repaired": Method(
        "scan, all before the first step, repaired", {**SCAN, "warm_up_importance": "none", **ONCE, "repair": "auto"}
    ),
    "influence-once": Method("block influence, scored again for each, all before the first step", INFLUENCE),
    "influence-once-time": Method(
        "the same, for the CPU time of a scan with drops from 5% to 25%", INFLUENCE, time_of="scan-quarter"
    ),
    "influence-ranked": Method("block influence, one ranking, all before the first step", RANKED),
    "influence-repaired": Method("block influence, one ranking, repaired", {**RANKED, "repair": "auto"}),
    "angular-once": Method(
        "successive blocks of the lowest angular distance, before the first step", {"importance": "angular", **ONCE}
    ),
    "angular-repaired": Method(
        "successive blocks of the lowest angular distance, repaired", {"importance": "angular", **ONCE, "repair": "auto"}
    ),
    "two-stages": Method(
        "`TrimConfig`'s defaults, eight at step 6, the rest at step 12", {"drop_every": "6", "layers_per_drop": 8}
    ),
    "influence-once-distilled": Method("block influence, at once, distilled", {**INFLUENCE, "distill_weight": 0.5}),
    "influence-quarter": Method("block influence, drops from 5% to 25%", {**SCAN, "importance": "block_influence"}),
    "last-once": Method("the last blocks, before the first step", LAST),
    "last-once-repaired": Method("the last blocks, before the first step, repaired", {**LAST, "repair": "auto"}),
    "head-tuned": Method("the last blocks, before the first step; only head and last three train", LAST, only_head=True),
    "head-tuned-repaired": Method(
        "the last blocks, repaired; only head and last three train", LAST, only_head=True, repaired=True
    ),
    "random-once": Method("random blocks, before the first step", {"importance": "random", **ONCE}),
    "scratch": Method("a random model of that depth", from_scratch=True),
}
