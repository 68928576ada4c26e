"""Scores from what flows through the layers, without a loss. Padding does not count.

Input and output of each block are caught with hooks: a model's last `hidden_states` is behind the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..calibration import Batch, model_inputs
from ..stack import find_stack
from .units import block_input, block_output

See = Callable[[int, torch.Tensor, torch.Tensor], None]  # position, input and output of shape (rows, tokens, width)


def block_influence(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """1 - cos(x, y) of a block's input x and output y, mean over tokens: ShortGPT's BI (arXiv 2403.03853, eq. 1)."""
    return _mean_over_tokens(model, batches, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1))


def layer_redundancy(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """-cos(x, y): the negative of the Layer Redundancy of Dynamic LLM Slicing (arXiv 2411.03513, §3.1).

    `block_influence` - 1, so both rank alike. The paper scales it to [0, 1] over the layers, which ranks alike too.
    """
    return _mean_over_tokens(model, batches, lambda x, y: -torch.cosine_similarity(x, y, dim=-1))


def activation_norm(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """-||y||: the layer whose output has the largest norm is the least important (TrimLLM, arXiv 2412.11242, eq. 4).

    The paper takes the Frobenius norm of the whole activation, which grows with the number of tokens, padding included.
    Here it is the norm of each token's row, mean over the real tokens. A block's output is the hidden state that it
    hands on.
    """
    return _mean_over_tokens(model, batches, lambda x, y: -y.norm(dim=-1))


def relative_magnitude(model: nn.Module, batches: Sequence[Batch], unit: str) -> tuple[torch.Tensor, float]:
    """||f(x)|| / ||x + f(x)|| of what a block adds, f(x) = y - x, mean over tokens.

    Weight subcloning (Samragh et al., arXiv 2312.09299), as ShortGPT compares it (arXiv 2403.03853, §4).
    """
    return _mean_over_tokens(model, batches, lambda x, y: (y - x).norm(dim=-1) / y.norm(dim=-1))


def angular(model: nn.Module, batches: Sequence[Batch], unit: str, window: int = 1) -> tuple[torch.Tensor, float]:
    """arccos(cos(x, y)) / pi of the last token, x before and y after `window` successive blocks, mean over sequences.

    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887, eq. 7).

    Returns:
        Totals of shape (layers - window + 1,), one for each window by its first block; and the number of sequences.
    """
    depth = len(find_stack(model))
    totals = torch.zeros(depth - window + 1, dtype=torch.float64)
    count = 0.0
    for batch in batches:
        states: list[torch.Tensor] = []  # the input of each block, then the output of the last
        pick = partial(_last_tokens, mask=_tokens(model, batch)[1])

        def see(position: int, x: torch.Tensor, y: torch.Tensor, pick: Any = pick, states: Any = states) -> None:
            states.append(pick(x))
            if position == depth - 1:
                states.append(pick(y))

        _watch(model, batch, see)
        for start in range(len(totals)):
            cosine = torch.cosine_similarity(states[start], states[start + window], dim=-1)
            totals[start] += (cosine.clamp(-1, 1).arccos() / math.pi).sum().double().cpu()
        count += len(states[0])
    return totals, count


def _mean_over_tokens(
    model: nn.Module, batches: Sequence[Batch], measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Sum over real tokens of a measure of a block's input and output, for each block; and the number of tokens."""
    totals = torch.zeros(len(find_stack(model)), dtype=torch.float64)
    count = 0.0
    for batch in batches:
        tokens, mask = _tokens(model, batch)

        def see(position: int, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = mask) -> None:
            of_tokens = measure(x, y)
            # not times the mask: padding may be anything, NaN too
            of_tokens = of_tokens if mask is None else of_tokens.masked_fill(mask == 0, 0)
            totals[position] += of_tokens.sum().double().cpu()

        _watch(model, batch, see)
        count += float(mask.sum()) if mask is not None else tokens.shape[:2].numel()
    return totals, count


def _watch(model: nn.Module, batch: Batch, see: See) -> None:
    """Run the model on a batch and show each block's input and output, in float32."""

    def hook(position: int) -> Any:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(position, block_input(args, kwargs).float(), block_output(output).float())

        return show

    with ExitStack() as stack:
        for position, block in enumerate(find_stack(model).blocks):
            stack.callback(block.register_forward_hook(hook(position), with_kwargs=True).remove)
        model(**model_inputs(batch))


def _tokens(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that a stack's blocks work on, and which are real: a decoder's are others than those of its encoder."""
    part, labels = find_stack(model).part, batch.get("labels")
    if part == "decoder" and "decoder_input_ids" in batch:
        tokens, mask = batch["decoder_input_ids"], batch.get("decoder_attention_mask")
    elif part == "decoder" and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        # moved on by one, they are the tokens
        tokens, mask = labels, batch.get("decoder_attention_mask", labels != -100)
    else:
        tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
        mask = batch.get("attention_mask")
    return tokens, mask if mask is not None and mask.dim() == 2 else None  # a mask over pairs says nothing of padding


def _last_tokens(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Of states of shape (rows, tokens, width), those of each row's last real token."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * (mask != 0)).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last.to(states.device)]
