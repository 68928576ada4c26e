"""Leave-one-out: what the loss becomes when a layer is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..calibration import Batch
from ..stack import find_stack


def sensitivity(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """Loss per token on the calibration set without the layer: TrimLLM's sensitivity scan (arXiv 2412.11242, §3.2).

    The paper ranks by accuracy on the calibration set, in which layers tie; the loss on the answer does not.

    Raises:
        ValueError: If a batch has no labels.
    """
    blocks = find_stack(model).blocks
    totals = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0.0
    for batch in batches:
        tokens = num_label_tokens(model, batch)
        for position, block in enumerate(blocks):
            with skipped(block):
                loss = model(**batch).loss.double().cpu()
            if tokens:  # the mean over no labels is not a number
                totals[position] += loss * tokens
        count += tokens
    return totals, count


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Make a block hand its input on. It still runs, so that its output's form is right in every architecture."""

    def give_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states = block_input(args, kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    handle = block.register_forward_hook(give_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]


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
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        labels = labels[..., 1:]  # a causal model predicts each token but the first
    return float((labels != -100).sum())
