"""Finds by experiment where a block adds the output of a linear map to the hidden states, without a table of architectures.

A change of the map's output must come out of the block multiplied by one number, the same for every token. In most
architectures this holds for the MLP's down projection. In a block that ends with a norm (BERT) it holds in front of that
norm. It does not hold if the MLP's output is normalized before it is added (Gemma 2, OLMo 2), or weighted per token (a
mixture of experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...engines import full_shape


@dataclass(frozen=True)
class OutputProjection:
    """A linear map whose output is added to the hidden states.

    Attributes:
        name: The map, by its name in the block.
        scale: What its output is multiplied by before it is added: 1, or a residual multiplier (Granite).
        norm: The norm applied to the sum, by its name in the block; None: the sum is the block's output.
    """

    name: str
    scale: float
    norm: str | None = None


class Seen:
    """The inputs and outputs of modules of a block in one call."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}


def find_output_projection(block: nn.Module, run: Callable[[], torch.Tensor], shared: set[int]) -> OutputProjection | None:
    """The widest linear map of a block that adds to the hidden states.

    Args:
        block: The block.
        run: Calls it again on the same input, and returns the hidden states.
        shared: Parameters, by `id`, that other modules hold as well; they must not be changed.
    """
    width = run().shape[-1]
    projections = {name: module for name, module in block.named_modules() if _is_candidate(module, width, shared)}
    norms = [name for name, module in block.named_modules() if name and is_norm(module)]
    for name in sorted(projections, key=lambda name: (-shape_of(projections[name])[0], name)):
        with seeing(block, [name, *norms]) as before:
            result = run()
        if name not in before.outputs or before.outputs[name].numel() != result.numel():
            continue
        push = _push(result, before.outputs[name])
        with pushing(block.get_submodule(name), push), seeing(block, norms) as after:
            pushed = run()
        scale = _multiple(pushed, result, push)
        if scale is not None:
            return OutputProjection(name, scale)
        for norm in norms:
            closes = norm in before.outputs and norm in after.inputs and torch.equal(before.outputs[norm], result)
            if closes and (scale := _multiple(after.inputs[norm], before.inputs[norm], push)) is not None:
                return OutputProjection(name, scale, norm)
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weights are plain numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(module, nn.Linear | Conv1D):
        return False
    return weight.is_floating_point() and len(full_shape(weight)) == 2  # others are quantized


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    weight: torch.Tensor = projection.weight  # type: ignore[assignment]
    shape = tuple(full_shape(weight))
    return (shape[0], shape[1]) if isinstance(projection, Conv1D) else (shape[1], shape[0])


def is_norm(module: nn.Module) -> bool:
    """Whether a module has only one-dimensional weights, and no submodules with weights."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(len(full_shape(p)) == 1 for p in own) and not list(module.children())


@contextmanager
def seeing(block: nn.Module, names: list[str]) -> Iterator[Seen]:
    """Record the inputs and outputs of some modules of a block."""
    seen, handles = Seen(), []
    for name in names:

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            got = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if got is not None and isinstance(output, torch.Tensor):
                seen.inputs[name], seen.outputs[name] = got, output

        handles.append(block.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pushing(projection: nn.Module, push: torch.Tensor) -> Iterator[None]:
    """Add something to what a module returns."""
    handle = projection.register_forward_hook(lambda _, args, output: output + push.reshape(output.shape).to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def _is_candidate(module: nn.Module, width: int, shared: set[int]) -> bool:
    return is_linear(module) and shape_of(module)[1] == width and not shared & {id(p) for p in module.parameters()}


def _push(result: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Random numbers, for each token as large as its hidden states, so that rounding does not hide them."""
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(result.shape, generator=generator).to(result.device)
    size = result.float().norm(dim=-1, keepdim=True) + written.float().reshape(result.shape).norm(dim=-1, keepdim=True)
    return push * size / push.norm(dim=-1, keepdim=True)


def _multiple(after: torch.Tensor, before: torch.Tensor, push: torch.Tensor) -> float | None:
    """The factor by which a difference is a multiple of the push, the same for each token; None if there is none."""
    exact = before.dtype == torch.float32 and not torch.is_autocast_enabled(before.device.type)
    difference = (after.float() - before.float()).reshape(-1, push.shape[-1])
    push = push.reshape(difference.shape)
    size = push.norm(dim=-1).clamp(min=1e-30)
    of_tokens = (difference * push).sum(dim=-1) / size**2
    real = torch.isfinite(of_tokens)  # padding may hold anything
    if not real.any():
        return None
    scale = float(of_tokens[real].median())
    misfit = ((difference - scale * push).norm(dim=-1) / size)[real].max()
    if not scale or misfit > (1e-3 if exact else 0.05) * abs(scale):
        return None
    return float(f"{scale:.3g}") if exact and abs(scale - float(f"{scale:.3g}")) < 1e-4 * abs(scale) else scale
