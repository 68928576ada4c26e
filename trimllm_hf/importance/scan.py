"""Leave-one-out: what a measure of the model becomes when a unit is left out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..engines import ProcessGroup
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.units import list_units, without
from .calibration import Batch, model_inputs, num_tokens
from .finite import refuse_not_finite
from .labelled import Labelled, labelled
from .metrics import LOSS, Metric, exponential
from .sweep import Sweep, can_sweep, free_bytes

logger = logging.get_logger("transformers.trimllm_hf")


@dataclass(frozen=True)
class ScanSettings:
    """How a scan runs. Only `metric` changes a score beyond rounding.

    Attributes:
        metric: What is measured of the model without a unit.
        memory_gb: Memory for the candidates beside that of a forward pass, in 10^9 bytes; None: half of what is free.
        process_group: The processes of the run.
        progress: Whether to show a bar with the candidates scored.
    """

    metric: Metric
    memory_gb: float | None
    process_group: ProcessGroup
    progress: bool


def sensitivity(metric: Metric) -> Metric:
    """The metric on the calibration set without the unit: TrimLLM's sensitivity scan (arXiv 2412.11242, §3.2).

    The paper's metric is the accuracy, in which layers tie (hence its tie-breaker); the loss on the answer does not.
    """
    return metric


def perplexity(metric: Metric) -> Metric:
    """Perplexity on the calibration set without the unit: Shortened LLaMA's PPL (arXiv 2402.02834, §2.2).

    exp of the mean loss per token, so it ranks as `sensitivity` does by the loss.

    Raises:
        ValueError: If the metric is not the loss.
    """
    if metric is not LOSS:
        raise ValueError(f"Expected the metric 'loss' for the importance 'perplexity', got {metric.name!r}.")
    return exponential(metric)


def scan(model: nn.Module, batches: Sequence[Batch], num_counted: int, unit: str, settings: ScanSettings) -> torch.Tensor:
    """The importance of each unit: a measure of the model without it, the same on every process.

    Args:
        model: The model, in evaluation mode.
        batches: This process's batches, as many as on every other: each makes the same forward passes.
        num_counted: How many of them count; those behind are for the others' sake.
        unit: "block".
        settings: How to go about it.
    """
    scanner = _Scanner(model, unit, batches, settings)
    metric, units = settings.metric, scanner.units
    for batch in batches:
        metric.check(model, batch)
    parts: list[list[Any]] = [[] for _ in units]
    bar = logging.tqdm(total=len(units) * len(batches), desc="Layers scored", disable=not settings.progress)
    with bar:
        for number, batch in enumerate(batches):
            for position, (output, its_batch) in enumerate(scanner.outputs(batch)):
                if number < num_counted:
                    parts[position].append(metric.collect(model, output, its_batch))
                    if number == position == 0:
                        _refuse_too_much(parts[0][0], len(units) * num_counted)
                bar.update()
    everyones = settings.process_group.gather(parts)
    found = [metric.finish([part for process in everyones for part in process[i]]) for i in range(len(units))]
    scores = torch.tensor([metric.importance(value) for value in found], dtype=torch.float64)
    refuse_not_finite(metric.name, scores, [_not_finite(process) for process in everyones])
    return scores


def _not_finite(parts: list[list[Any]]) -> list[tuple[list[int], int]]:
    """Which units' parts hold what is not finite, in which batch."""
    bad: dict[int, list[int]] = {}
    for position, of_unit in enumerate(parts):
        for number, part in enumerate(of_unit):
            if not all(np.isfinite(leaf).all() for leaf in tree_leaves(part) if leaf is not None):
                bad.setdefault(number, []).append(position)
    return [(layers, number) for number, layers in bad.items()]


def _refuse_too_much(part: Any, times: int) -> None:
    """Refuse to keep more predictions than there is memory for."""
    need, free = sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(part)) * times, psutil.virtual_memory().available
    if need > free / 2:
        raise ValueError(
            f"Expected predictions that fit in memory, got {need / 1e9:.1f} GB for all layers and examples, with "
            f"{free / 1e9:.1f} GB free. Reduce them with preprocess_logits_for_metrics (for a language model: "
            "logits.argmax(-1)), or use fewer calibration examples."
        )


class _Scanner:
    """Yields the model's output without each unit: by sweeps, or one by one where a model does not allow them.

    What it decides, it decides with the other processes: each of them makes the same forward passes.
    """

    def __init__(self, model: nn.Module, unit: str, batches: Sequence[Batch], settings: ScanSettings) -> None:
        self.model, self.process_group = model, settings.process_group
        self.blocks = list(find_blocks(model).blocks)
        self.units = list_units(model, unit)
        self.one_by_one = self._any(not all(can_sweep(model, batch) for batch in batches))
        budget = settings.memory_gb * 1e9 if settings.memory_gb else free_bytes(next(model.parameters()).device) / 2
        state = max(map(num_tokens, batches), default=1) * find_blocks(model).config.hidden_size * 4
        # as many candidates a sweep as half of the budget holds; the other half is for the work on them
        self.at_once = min(self.process_group.gather(max(1, min(len(self.units), int(budget / 2 // state) - 1))))
        self.sweep = Sweep(model, self.blocks, budget, self.process_group.gathered)
        self.only_labels = settings.metric.of_labels
        self.checked = False

    def outputs(self, batch: Batch) -> Iterator[tuple[Any, Batch]]:
        """The model's output on the batch without each unit, and what of the batch it is for."""
        inputs, reference = model_inputs(batch), None
        if not self.checked and not self.one_by_one:
            with self.process_group.gathered(()):  # what an engine has fetched ahead for training would stay gathered
                pass
            reference = self.sweep.learn(lambda: self._without(0, inputs))
        for start in range(0, len(self.units), self.at_once):
            group = range(start, min(start + self.at_once, len(self.units)))
            found: Iterable[tuple[Any, Batch]] | None = None
            if not self.one_by_one:
                self.sweep.run(inputs, [self.units[i] for i in group])
                self.one_by_one = self._any(not self.sweep.fits)
            if not self.one_by_one:
                found = self._swept(self._part(batch)) if self.checked else self._checked(batch, reference)
                self.checked, self.one_by_one = True, found is None
            if found is not None:
                yield from found
                continue
            self.sweep.forget()
            logger.warning_once(
                f"{type(base_of(self.model)).__name__} cannot be run on several candidates at once here: scoring them one "
                "by one, which takes about twice the time."
            )
            for position in group:
                yield self._without(position, inputs), batch

    def _checked(self, batch: Batch, reference: Any) -> Iterable[tuple[Any, Batch]] | None:
        """The sweep's outputs if the first is right, on the positions that count or else on all; None if neither is."""
        tolerance = self.sweep.tolerance
        for only_labels in (True, False) if self.only_labels else (False,):
            self.only_labels = only_labels
            part = self._part(batch)
            outputs = self._swept(part)
            first = next(outputs)
            right = _alike(first[0].logits, part.of(reference.logits), tolerance)
            if part.positions is not None:
                right = right and _alike(first[0].loss, reference.loss, tolerance)
            if not self._any(not right):
                return chain([first], outputs)
            outputs.close()  # gives the blocks their own forward back
        return None

    def _part(self, batch: Batch) -> Labelled:
        return labelled(self.model, batch) if self.only_labels else Labelled(batch)

    def _swept(self, part: Labelled) -> Generator[tuple[Any, Batch], None, None]:
        with closing(self.sweep.outputs(model_inputs(part.batch), part.of)) as outputs:
            for output in outputs:
                yield output, part.batch

    def _without(self, position: int, batch: Batch) -> Any:
        with without(self.units[position], self.blocks):
            return self.model(**batch)

    def _any(self, here: bool) -> bool:
        return any(self.process_group.gather(here))


def _alike(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same but for rounding."""
    one, other = (torch.nan_to_num(each.float()) for each in (one, other))
    return bool((one - other).abs().mean() <= tolerance * other.abs().mean())
