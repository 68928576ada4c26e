"""Leave-one-out: measures the model with each unit left out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from ..engines import ProcessGroup
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.units import list_units, without
from .calibration import Batch
from .finite import refuse_not_finite
from .labelled import Labelled, labelled
from .metrics import Metric, exponential, model_output
from .sweep import Sweep, alike

logger = logging.get_logger("transformers.trimllm_hf")


@dataclass(frozen=True)
class ScanSettings:
    """How a scan runs. Only `metric` changes a score beyond rounding.

    Attributes:
        metric: What is measured on the model without a unit.
        memory_gb: Memory for the candidates in addition to a forward pass, in 10^9 bytes; None: half of the free memory.
        process_group: The processes of the run.
        progress: Whether to show a bar with the candidates scored.
        of_batches: Called with the scores on each batch of all processes, if the metric is defined for a single batch.
    """

    metric: Metric
    memory_gb: float | None
    process_group: ProcessGroup
    progress: bool
    of_batches: list[torch.Tensor] | None = None


def sensitivity(metric: Metric) -> Metric:
    """The metric on the calibration set without the unit: TrimLLM's sensitivity scan (arXiv 2412.11242, §3.2).

    The paper's metric is the accuracy, for which layers tie (hence its tie-breaker); for the loss on the answer they do not.
    """
    return metric


def perplexity(metric: Metric) -> Metric:
    """Perplexity on the calibration set without the unit: Shortened LLaMA's PPL (arXiv 2402.02834, §2.2).

    exp of the mean loss per token, so it ranks as `sensitivity` does by the loss.

    Raises:
        ValueError: If the metric is not the loss.
    """
    if metric.name != "loss":
        raise ValueError(f"Expected the metric 'loss' for the importance 'perplexity', got {metric.name!r}.")
    return exponential(metric)


def scan(
    model: nn.Module,
    batches: Sequence[Batch],
    num_counted: int,
    unit: str,
    settings: ScanSettings,
    part: str | None = None,
) -> torch.Tensor:
    """The importance of each unit: a measure of the model without it, the same on every process.

    Args:
        model: The model, in evaluation mode.
        batches: This process's batches, the same number on every process: all make the same forward passes.
        num_counted: How many of them count; the rest only keep the processes in step.
        unit: "block".
        settings: How the scan runs.
        part: For an encoder-decoder, the stack that the units belong to.
    """
    scanner = _Scanner(model, unit, settings, part)
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
    if settings.of_batches is not None and metric.of_each_batch:
        settings.of_batches.extend(_of_each_batch(metric, everyones))
    return scores


def _of_each_batch(metric: Metric, everyones: Sequence[list[list[Any]]]) -> Iterator[torch.Tensor]:
    """The scores on each batch of each process; one without labels has none."""
    for process in everyones:
        for of_units in zip(*process, strict=True):
            with suppress(ValueError):
                found = [metric.importance(metric.finish([part])) for part in of_units]
                yield torch.tensor(found, dtype=torch.float64)


def _not_finite(parts: list[list[Any]]) -> list[tuple[list[int], int]]:
    """The units with values that are not finite, and the batch."""
    bad: dict[int, list[int]] = {}
    for position, of_unit in enumerate(parts):
        for number, part in enumerate(of_unit):
            if not all(np.isfinite(leaf).all() for leaf in tree_leaves(part) if leaf is not None):
                bad.setdefault(number, []).append(position)
    return [(layers, number) for number, layers in bad.items()]


def _refuse_too_much(part: Any, times: int) -> None:
    """Refuse to keep more predictions than fit in memory."""
    need, free = sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(part)) * times, psutil.virtual_memory().available
    if need > free / 2:
        raise ValueError(
            f"Expected predictions that fit in memory, got {need / 1e9:.1f} GB for all layers and examples, with "
            f"{free / 1e9:.1f} GB free. Reduce them with preprocess_logits_for_metrics (for a language model: "
            "logits.argmax(-1)), or use fewer calibration examples."
        )


class _Scanner:
    """Runs the metric without each unit: in sweeps, or one by one where a model or a loss does not allow sweeps.

    Decisions are made jointly with the other processes, since all make the same forward passes.
    """

    def __init__(self, model: nn.Module, unit: str, settings: ScanSettings, part: str | None) -> None:
        self.model, self.metric, self.process_group = model, settings.metric, settings.process_group
        self.blocks = list(find_blocks(base_of(model), part).blocks)
        self.units = list_units(model, unit, part)
        budget = settings.memory_gb * 1e9 if settings.memory_gb else free_bytes(next(model.parameters()).device) / 2
        self.sweep = Sweep(
            model, self.blocks, budget, self.process_group.gathered, only_output=self.metric.run is model_output
        )
        self.one_by_one = self.checked = False
        self.only_labels = self.metric.of_labels

    def outputs(self, batch: Batch) -> Iterator[tuple[Any, Batch]]:
        """Yield the metric's run on the batch without each unit, and the part of the batch it is for."""
        reference = None
        if not self.checked and not self.one_by_one:
            with self.process_group.gathered(()):  # what an engine has prefetched for training would stay gathered
                pass
            reference = self.sweep.learn(lambda: self._without(0, batch))
        if not self.one_by_one:
            self.sweep.look(lambda: self.metric.run(self.model, batch), batch)
            self.one_by_one = self._any(not self.sweep.fits)
        at_once = len(self.units)
        if not self.one_by_one:
            self.sweep.widen()
            at_once = min(self.process_group.gather(self.sweep.at_once(len(self.units))))
        for start in range(0, len(self.units), at_once):
            group = range(start, min(start + at_once, len(self.units)))
            found: Iterable[tuple[Any, Batch]] | None = None
            if not self.one_by_one:
                self.sweep.run([self.units[i] for i in group])
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
                yield self._without(position, batch), batch

    def _checked(self, batch: Batch, reference: Any) -> Iterable[tuple[Any, Batch]] | None:
        """The sweep's outputs if the first is correct, on the labelled positions or else on all; None if neither is."""
        if self._any(not self.sweep.is_right()):
            return None
        tolerance = self.sweep.tolerance
        for only_labels in (True, False) if self.only_labels else (False,):
            self.only_labels = only_labels
            part = self._part(batch)
            outputs = self._swept(part)
            first = next(outputs)
            if part.positions is None:
                right = all(map(partial(alike, tolerance=tolerance), _figures(first[0]), _figures(reference)))
            else:
                right = alike(first[0].logits, part.of(reference.logits), tolerance)
                right = right and alike(first[0].loss, reference.loss, tolerance)
            if not self._any(not right):
                return chain([first], outputs)
            outputs.close()  # restores the blocks' own forward
        return None

    def _part(self, batch: Batch) -> Labelled:
        return labelled(self.model, batch) if self.only_labels else Labelled(batch)

    def _swept(self, part: Labelled) -> Generator[tuple[Any, Batch], None, None]:
        run = partial(self.metric.run, self.model, part.batch)
        with closing(self.sweep.outputs(run, part.of)) as outputs:
            for output in outputs:
                yield output, part.batch

    def _without(self, position: int, batch: Batch) -> Any:
        with without(self.units[position], self.blocks):
            return self.metric.run(self.model, batch)

    def _any(self, here: bool) -> bool:
        return any(self.process_group.gather(here))


def _figures(output: Any) -> list[torch.Tensor]:
    """The tensors of an output to compare: a model's loss and logits, which are computed after the blocks."""
    if isinstance(output, ModelOutput) and "logits" in output:
        return [output["logits"]]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def free_bytes(device: torch.device) -> int:
    """Memory currently available on a device, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(psutil.virtual_memory().available)
