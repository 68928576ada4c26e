"""Scores from the layers' inputs and outputs, without a loss. Padding is ignored.

Input x and output y of each block are recorded as it runs, since a model's last `hidden_states` come after the final norm.
For an attention or an MLP they are the hidden states before and after its residual connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.units import Unit, block_input, block_output, list_units, without
from .calibration import Batch, model_inputs
from .calls import Inputs, noted_calls
from .forwards import Forward, refuse_not_run, replaced_forwards
from .labelled import headless

Mask = torch.Tensor | None  # of shape (rows, tokens)
Show = Callable[[int, torch.Tensor, torch.Tensor], None]  # number of a unit, its x and y of shape (rows, tokens, width)
See = Callable[[int, torch.Tensor, torch.Tensor, Mask], None]  # the same in float32, and which tokens are not padding


def block_influence(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None
) -> tuple[torch.Tensor, float]:
    """1 - cos(x, y) of a block's input x and output y, mean over tokens: ShortGPT's BI (arXiv 2403.03853, eq. 1)."""
    return _mean_over_tokens(model, batches, unit, part, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1))


def layer_redundancy(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None
) -> tuple[torch.Tensor, float]:
    """-cos(x, y): the negative of the Layer Redundancy of Dynamic LLM Slicing (arXiv 2411.03513, §3.1).

    `block_influence` - 1, so both rank alike. The paper scales it to [0, 1] over the layers, which keeps the ranking.
    """
    totals, count = block_influence(model, batches, unit, part)
    return totals - count, count


def activation_norm(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None
) -> tuple[torch.Tensor, float]:
    """Minus the norm of the output: in TrimLLM the layer with the largest norm is the least important (2412.11242, eq. 4).

    The paper takes the Frobenius norm of the whole activation, which grows with the number of tokens, padding included.
    Here it is the norm of each token's row, averaged over the real tokens. The output is what the layer's own module
    returns: the hidden states y for a block; what is added to them, y - x, for an attention or an MLP.
    """
    if unit == "block":
        return _mean_over_tokens(model, batches, unit, part, lambda x, y: -y.norm(dim=-1))
    return _mean_over_tokens(model, batches, unit, part, lambda x, y: -(y - x).norm(dim=-1))


def relative_magnitude(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None
) -> tuple[torch.Tensor, float]:
    """||f(x)|| / ||x + f(x)||, where f(x) = y - x is what a block adds, mean over tokens.

    Weight subcloning (Samragh et al., arXiv 2312.09299), as ShortGPT compares it (arXiv 2403.03853, §4).
    """
    return _mean_over_tokens(model, batches, unit, part, lambda x, y: (y - x).norm(dim=-1) / y.norm(dim=-1))


def angular(
    model: nn.Module, batches: Sequence[Batch], unit: str, part: str | None = None, window: int = 1
) -> tuple[torch.Tensor, float]:
    """arccos(cos(x, y)) / pi of the last token, x before and y after `window` successive blocks, mean over sequences.

    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887, eq. 7).

    Returns:
        Totals of shape (layers - window + 1,), one for each window by its first block; and the number of sequences.

    Raises:
        ValueError: If the unit is not "block".
    """
    if unit != "block":
        raise ValueError(f"Expected unit='block' for the importance 'angular', which is of successive blocks, got {unit!r}.")
    depth = len(find_blocks(base_of(model), part))
    totals = torch.zeros(depth - window + 1, dtype=torch.float64)
    count = 0.0
    for batch in batches:
        states: dict[int, torch.Tensor] = {}  # the input of each block, then the output of the last

        def see(number: int, x: torch.Tensor, y: torch.Tensor, mask: Mask, states: Any = states) -> None:
            states[number] = _last_tokens(x, mask)
            if number == depth - 1:
                states[depth] = _last_tokens(y, mask)

        _watch(model, batch, unit, part, see)
        for start in range(len(totals)):
            cosine = torch.cosine_similarity(states[start], states[start + window], dim=-1)
            totals[start] += (cosine.clamp(-1, 1).arccos() / math.pi).sum().double().cpu()
        count += len(states[0])
    return totals, count


def _mean_over_tokens(
    model: nn.Module,
    batches: Sequence[Batch],
    unit: str,
    part: str | None,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Sum over real tokens of a measure of a unit's input and output, for each unit; and the number of tokens."""
    totals = torch.zeros(len(list_units(model, unit, part)), dtype=torch.float64)
    count = 0.0

    def see(number: int, x: torch.Tensor, y: torch.Tensor, mask: Mask) -> None:
        nonlocal count
        of_tokens = distance(x, y)
        # not multiplied by the mask: padding may hold anything, even NaN
        of_tokens = of_tokens if mask is None else of_tokens.masked_fill(mask == 0, 0)
        totals[number] += of_tokens.sum().double().cpu()
        if number == 0:
            count += float(mask.sum()) if mask is not None else of_tokens.numel()

    for batch in batches:
        _watch(model, batch, unit, part, see)
    return totals, count


def _watch(model: nn.Module, batch: Batch, unit: str, part: str | None, see: See) -> None:
    """Run the model on a batch and call `see` for each unit with the hidden states before and after it and the token mask.

    Raises:
        ValueError: If a unit does not run.
    """
    base, units = base_of(model), list_units(model, unit, part)
    stack = find_blocks(base, part)
    ran: set[int] = set()

    with noted_calls(base) as calls:

        def show(number: int, x: torch.Tensor, y: torch.Tensor) -> None:
            ran.add(number)
            see(number, x.float(), y.float(), _mask(base, stack.part, calls[-1], x))

        make = _blocks(show) if unit == "block" else _parts(show, units, list(stack.blocks))
        with replaced_forwards(list(stack.blocks), make):
            model(**headless(model, model_inputs(batch)))
    refuse_not_run(ran, len(units))


def _blocks(show: Show) -> Callable[[int, Forward], Forward]:
    """Calls `show` with each block's input and output."""

    def make(position: int, forward: Forward) -> Forward:
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            show(position, block_input(args, kwargs), block_output(output))
            return output

        return watched

    return make


def _parts(show: Show, units: Sequence[Unit], blocks: list[nn.Module]) -> Callable[[int, Forward], Forward]:
    """Calls `show` with the hidden states before and after each part of a block.

    A block without its second part gives the states between the two. Which part is second, or whether both read the block's
    input, is determined by recomputing the block's output from its parts.
    """

    def make(position: int, forward: Forward) -> Forward:
        here = [number for number, unit in enumerate(units) if unit.position == position]

        def run_without(number: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            with without(units[number], blocks):
                if args:
                    return block_output(forward(hidden, *args[1:], **kwargs))
                return block_output(forward(**{**kwargs, "hidden_states": hidden}))

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            x, y = block_input(args, kwargs), block_output(output)
            if len(here) == 1:
                show(here[0], x, y)
            elif here:
                one, other = here
                # always the same four runs: under an engine they are collective
                after_one, after_other = run_without(other, x, args, kwargs), run_without(one, x, args, kwargs)
                one_first = _same(run_without(one, after_one, args, kwargs), y)
                other_first = _same(run_without(other, after_other, args, kwargs), y)
                of_one = (after_other, y) if other_first and not one_first else (x, after_one)
                of_other = (after_one, y) if one_first else (x, after_other)
                show(one, *of_one)
                show(other, *of_other)
            return output

        return watched

    return make


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two states are equal up to rounding."""
    difference = (one.float() - other.float()).abs().mean()
    return bool(difference <= (1e-3 if one.dtype == torch.float32 else 0.02) * other.float().abs().mean())


def _mask(base: Any, part: str | None, inputs: Inputs, hidden: torch.Tensor) -> Mask:
    """Which tokens of a stack's hidden states are real, of shape (rows, tokens); decoder and encoder have different tokens.

    None if there is no mask, or it is not over tokens but over pairs of tokens or an image's pixels.
    """
    labels = inputs.get("labels")
    mask: Any = inputs.get("attention_mask" if part != "decoder" else "decoder_attention_mask")
    if part == "decoder" and mask is None and inputs.get("decoder_input_ids") is None and labels is not None:
        mask = labels != -100  # the tokens are the labels, shifted by one
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    if part != "decoder" and hasattr(base, "_get_feature_vector_attention_mask"):  # audio: the mask is over samples
        mask = base._get_feature_vector_attention_mask(hidden.shape[1], mask)
    if inputs.get("past_key_values") is not None:  # a prefix (PEFT) has a mask but no hidden states
        mask = mask[:, -hidden.shape[1] :]
    return mask if mask.shape == hidden.shape[:2] else None


def real_tokens(model: nn.Module, batch: Batch, part: str | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that a stack's blocks process, and which of them are real; decoder and encoder have different tokens."""
    base, labels = base_of(model), batch.get("labels")
    stack = find_blocks(base, part)
    part = stack.part
    if part == "decoder" and "decoder_input_ids" in batch:
        tokens, mask = batch["decoder_input_ids"], batch.get("decoder_attention_mask")
    elif part == "decoder" and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        # shifted by one, they are the tokens
        tokens, mask = labels, batch.get("decoder_attention_mask", labels != -100)
    elif "input_ids" in batch or "inputs_embeds" in batch:
        tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
        mask = batch.get("attention_mask")
    else:  # images, audio: the input of the first block
        tokens = _first_states(model, stack.blocks[0], batch)
        mask = _mask(base, part, batch, tokens)
    return tokens, mask if mask is not None and mask.dim() == 2 else None  # a mask over pairs does not describe padding


def _first_states(model: nn.Module, first: nn.Module, batch: Batch) -> torch.Tensor:
    """The hidden states at the input of the first block."""
    found: list[torch.Tensor] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        found.append(block_input(args, kwargs))

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**model_inputs(batch))
    finally:
        handle.remove()
    return found[0]


def _last_tokens(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The states of each row's last real token, from states of shape (rows, tokens, width)."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * (mask != 0)).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last.to(states.device)]
