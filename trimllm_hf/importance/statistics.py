"""Scores from what flows through the layers, without a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..calibration import Batch
from ..stack import find_stack
from .sweep import block_input


def block_influence(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """1 - cosine of a block's input and output, mean over real tokens: ShortGPT's BI (arXiv 2403.03853, eq. 1).

    Input and output are caught with hooks: a model's last `hidden_states` is behind the final norm.
    """
    if unit != "block":
        raise ValueError(f"Expected unit='block' for the importance 'block_influence', got {unit!r}. Use 'sensitivity'.")
    stack = find_stack(model)
    blocks = stack.blocks
    totals = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0.0
    mask: torch.Tensor | None = None

    def catch(position: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = block_input(args, kwargs).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            change = 1 - torch.cosine_similarity(before, after, dim=-1)
            totals[position] += (change if mask is None else change * mask).sum().double().cpu()

        return hook

    handles = [block.register_forward_hook(catch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for batch in batches:
            tokens, mask = _tokens(batch, stack.part)
            if mask is not None and mask.dim() != 2:
                mask = None  # a mask over pairs of tokens says nothing of padding
            model(**batch)
            count += float(mask.sum()) if mask is not None else float(tokens.numel())
    finally:
        for handle in handles:
            handle.remove()
    return totals, count


def _tokens(batch: Batch, part: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that a stack's blocks work on, and their mask: a decoder's are others than those of its encoder."""
    labels = batch.get("labels")
    if part == "decoder" and "decoder_input_ids" in batch:
        return batch["decoder_input_ids"], batch.get("decoder_attention_mask")
    if part == "decoder" and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        return labels, batch.get("decoder_attention_mask", labels != -100)  # moved on by one, they are the tokens
    return batch["input_ids"], batch.get("attention_mask")
