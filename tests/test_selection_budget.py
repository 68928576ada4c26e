"""What a selection budget affords: never more than it, and the more the larger it is."""

from __future__ import annotations

import pytest

from trimllm_hf.training.selection_budget import STEP, plan_selection

STEPS = (2, 10, 100, 1000, 3000, 10_000, 30_000, 100_000)


def test_what_is_planned_is_affordable() -> None:
    plans = [plan_selection(0.05, 4.0 * steps, 64, 30, 15) for steps in STEPS]
    for plan, steps in zip(plans, STEPS, strict=True):
        assert plan.passes <= plan.affordable == pytest.approx(0.05 * STEP * 4.0 * steps)
    assert [plan.examples for plan in plans[:4]] == [1, 6, 60, 64]
    assert plans[3].scanned == 0 and plans[-1].scanned == 64 and plans[-1].width is None
    assert [plan.passes for plan in plans] == sorted(plan.passes for plan in plans)


def test_more_moments_afford_less_each() -> None:
    once, each = plan_selection(0.05, 4000.0, 32, 30, 15), plan_selection(0.05, 4000.0, 32, 30, 1, moments=15)
    assert each.affordable == once.affordable / 15
    assert each.passes <= each.affordable


def test_a_budget_that_affords_nothing_is_refused() -> None:
    said = "0.001 of a run of 20 examples, each 3 passes, for 2 times: 0.03 passes. Raise it to 0.033"
    with pytest.raises(ValueError, match=said):
        plan_selection(0.001, 20, 64, 30, 1, moments=2)
    assert plan_selection(0.0334, 20, 64, 30, 1, moments=2).examples == 1
