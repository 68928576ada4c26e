"""How many layers to drop now, from the plan, the stop rule on a metric and the budget together."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .budget import Budget
from .schedule import Plan, layers_due
from .stop_rules import MetricRule


@dataclass(frozen=True)
class DropSchedule:
    """Determines when a run drops layers, and how many.

    Attributes:
        plan: How many layers to drop after which optimizer step.
        start: Depth when the run began, in the unit.
        least: The lowest depth allowed.
        layers_per_drop: How many are dropped at a time, beyond the plan.
        rule: The stop rule on a metric, if there is one: layers are dropped only after an evaluation that passes.
        budget: The budget, if there is one: layers are dropped until it is met, even beyond the plan.
    """

    plan: Plan
    start: int
    least: int
    layers_per_drop: int
    rule: MetricRule | None = None
    budget: Budget | None = None

    def may_drop_after(self, step: int, depth: int) -> bool:
        """Whether a drop may follow this step; called before the step is made, without measuring anything."""
        beyond = self.rule is not None or self.budget is not None
        return beyond or layers_due(self.plan, step, self.start - depth) > 0

    def must_evaluate(self, step: int, depth: int, model: PreTrainedModel) -> bool:
        """Whether the model must be evaluated after this step, regardless of the Trainer's own schedule."""
        return self.rule is not None and self.rule.must_evaluate(step, self.due(step, depth, model))

    def due_now(self, step: int, depth: int, model: PreTrainedModel) -> int:
        """How many layers to drop now: those due, unless an evaluation is required first."""
        if self.rule is not None and not self.rule.allows(step):
            return 0
        return self.due(step, depth, model)

    def due(self, step: int, depth: int, model: PreTrainedModel) -> int:
        """How many layers are due after this step, once an evaluation allows it."""
        if self.rule is not None:
            if not self.rule.is_open(step):
                return 0
            step = self.rule.plan_step(step)
        due = layers_due(self.plan, step, self.start - depth)
        if self.budget is None or not self.plan:
            return due
        if self.budget.met(model):
            return 0
        if due == 0 and step >= max(self.plan):  # beyond the plan: under a stop rule, each drop is evaluated
            return min(depth - self.least, self.layers_per_drop if self.rule else depth)
        return due

    def at_once(self, due: int) -> int:
        """How many of them to drop before checking again: a budget is measured after each drop."""
        return due if self.budget is None else min(due, self.layers_per_drop)

    def still_due(self, left: int, step: int, depth: int, model: PreTrainedModel) -> int:
        """How many more to drop now, after a drop that leaves `left` of those that were due."""
        due = self.due(step, depth, model)
        return due if self.rule is None else min(left, due)  # the evaluation allowed only those
