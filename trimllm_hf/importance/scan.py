"""Leave-one-out: what the model's loss becomes when a layer is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..adapters import base_of
from ..calibration import Batch, num_tokens
from ..stack import find_stack
from .agreement import Agree, least_and_most, on_any
from .sweep import Sweep, can_sweep, free_bytes, skipped

logger = logging.get_logger("transformers.trimllm_hf")

Measure = Callable[[nn.Module, Any, Batch], tuple[float, float]]  # model, output, batch -> total and count


@dataclass(frozen=True)
class ScanSettings:
    """How a scan runs. No field changes a score beyond rounding.

    Attributes:
        memory_gb: Memory for the candidates beside that of a forward pass, in 10^9 bytes; None: half of what is free.
        agree: Sums a tensor over the processes.
        sweep: Whether one pass may score several layers; else each is scored by a pass of its own.
        progress: Whether to show a bar with the candidates scored.
    """

    memory_gb: float | None = None
    agree: Agree = lambda total: total
    sweep: bool = True
    progress: bool = False


def sensitivity(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """Loss per token on the calibration set without the layer: TrimLLM's sensitivity scan (arXiv 2412.11242, §3.2).

    The paper ranks by accuracy on the calibration set, in which layers tie; the loss on the answer does not.

    Raises:
        ValueError: If a batch has no labels.
    """
    totals, counts = zip(*scan(model, batches, token_loss, ScanSettings()), strict=True)
    return torch.stack(totals).sum(0), sum(counts)


def token_loss(model: nn.Module, output: Any, batch: Batch) -> tuple[float, float]:
    """The loss, summed over the tokens that it is over, and their number."""
    tokens = num_label_tokens(model, batch)
    return (output.loss.item() * tokens if tokens else 0.0), tokens  # the mean over no labels is not a number


def scan(
    model: nn.Module, batches: Sequence[Batch], measure: Measure, settings: ScanSettings
) -> Iterator[tuple[torch.Tensor, float]]:
    """For each batch, a measure of the model's output without each layer, and its count.

    All processes have to take the same number of batches: each makes the same forward passes.
    """
    blocks = list(find_stack(model).blocks)
    scanner = _Scanner(model, blocks, batches, settings)
    bar = logging.tqdm(total=len(blocks) * len(batches), desc="Layers scored", disable=not settings.progress)
    with bar, _plain_outputs(model):
        for batch in batches:
            totals = torch.zeros(len(blocks), dtype=torch.float64)
            for position, output in scanner.outputs(batch):
                totals[position], count = measure(model, output, batch)
                bar.update()
            yield totals, count


class _Scanner:
    """Yields the model's output without each block: by sweeps, or one by one where a model does not allow them.

    What it decides, it decides with the other processes: each of them makes the same forward passes.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batches: Sequence[Batch], settings: ScanSettings) -> None:
        self.model, self.blocks, self.settings = model, blocks, settings
        self.told = not settings.sweep
        self.one_by_one = self.told or self._any(not all(can_sweep(model, batch) for batch in batches))
        budget = settings.memory_gb * 1e9 if settings.memory_gb else free_bytes(next(model.parameters()).device) / 2
        state = max(map(num_tokens, batches), default=1) * find_stack(model).config.hidden_size * 4
        # as many candidates a sweep as half of the budget holds; the other half is for the work on them
        held = max(1, min(len(blocks), int(budget / 2 // state) - 1))
        self.at_once, _ = least_and_most(settings.agree, held)
        self.sweep = Sweep(model, blocks, budget)
        self.checked = False

    def outputs(self, batch: Batch) -> Iterator[tuple[int, Any]]:
        """Each block's position and the model's output on the batch without the block."""
        reference = None
        if not self.checked and not self.one_by_one:
            reference = self.sweep.learn(lambda: self._without(0, batch))
        for start in range(0, len(self.blocks), self.at_once):
            group = range(start, min(start + self.at_once, len(self.blocks)))
            if not self.one_by_one:
                self.sweep.run(batch, group)
                self.one_by_one = self._any(not self.sweep.fits)
            if not self.one_by_one:
                outputs = self.sweep.outputs(batch, group)
                first = next(outputs)
                self.one_by_one = not self.checked and self._any(not _alike(first[1], reference, self.sweep.tolerance))
                self.checked = True
                if not self.one_by_one:
                    yield first
                    yield from outputs
                    continue
                outputs.close()  # gives the blocks their own forward back
            if not self.told:
                logger.warning_once(
                    f"{type(self.model).__name__} cannot be run on several candidates at once: scoring them one by one, "
                    "which takes about twice the time."
                )
            for position in group:
                yield position, self._without(position, batch)

    def _without(self, position: int, batch: Batch) -> Any:
        with skipped(self.blocks[position]):
            return self.model(**batch)

    def _any(self, here: bool) -> bool:
        return on_any(self.settings.agree, here)


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """No cache, which would mix the candidates, and no loss for balancing experts, which says nothing of the answer."""
    names = ("use_cache", "output_router_logits", "_output_attentions", "output_hidden_states")
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if isinstance(config, PreTrainedConfig)]
    configs += [config.get_text_config(decoder=True) for config in configs]
    unique = {id(config): config for config in configs}.values()
    had = [(config, name, vars(config)[name]) for config in unique for name in names if name in vars(config)]
    try:
        for config, name, _ in had:
            vars(config)[name] = False
        yield
    finally:
        for config, name, value in had:
            vars(config)[name] = value


def _alike(output: Any, reference: Any, tolerance: float) -> bool:
    """Whether two outputs are the same but for rounding."""
    one, other = (torch.nan_to_num(each.logits.float()) for each in (output, reference))
    return bool((one - other).abs().mean() <= tolerance * other.abs().mean())


def num_label_tokens(model: nn.Module, batch: Batch) -> float:
    """Number of labels that the model's mean loss is over.

    Raises:
        ValueError: If the batch has no labels.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"Expected calibration batches with labels, got only {sorted(batch)}. Use a collator that makes labels, or a "
            "score that needs none, like 'block_influence'."
        )
    if type(base_of(model)).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        labels = labels[..., 1:]  # a causal model predicts each token but the first
    return float((labels != -100).sum())
