"""A block's skeleton: a copy with random parameters in which small functions replace the attention and the MLP."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...engines import full_shape
from .pass_through import OutputSpec

MAX_ELEMENTS = 2**24  # a larger parameter of a skeleton stays on the meta device; a block that needs it is refused


class Probe(nn.Module):
    """A small function in place of a sublayer. Its one parameter shows, by its gradient, what depends on the sublayer."""

    def __init__(self, spec: OutputSpec, phase: float, detached: bool) -> None:
        super().__init__()
        self.spec, self.phase, self.detached = spec, phase, detached
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.input: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.input = OutputSpec(argument=0).hidden(args, kwargs)
        seen = self.input.detach() if self.detached else self.input
        result = self.spec.hidden(args, kwargs) + torch.sin(seen.roll(1, -1) * self.weight + self.phase)
        return result if self.spec.rest is None else (result, *[None] * self.spec.rest)


def block_skeleton(block: nn.Module, inside: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a block with random parameters, in which some of its modules are replaced.

    Args:
        block: The block. Its parameters' values are not read.
        inside: The replacements, by the names of the replaced modules in the block.
    """
    instead: dict[int, Any] = {id(block.get_submodule(name)): module for name, module in inside.items()}
    for module in block.modules():
        if hasattr(module, "config"):
            instead[id(module.config)] = module.config
    for path, module in block.named_modules():
        if within(path, inside):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            instead[id(parameter)] = nn.Parameter(_random(f"{path}.{name}", parameter))
        for name, buffer in module.named_buffers(recurse=False):
            instead[id(buffer)] = _random(f"{path}.{name}", buffer)
    return copy.deepcopy(block, instead).eval()


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _random(name: str, tensor: torch.Tensor) -> torch.Tensor:
    shape = full_shape(tensor)
    return torch.empty(shape, device="meta") if shape.numel() > MAX_ELEMENTS else numbers(name, shape)


def numbers(name: str, shape: torch.Size) -> torch.Tensor:
    """Random numbers of a shape in float64; the same for a given name in each run."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def depends(tensor: torch.Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether a tensor was computed from one of these parameters."""
    if not tensor.requires_grad or not parameters:
        return False
    return any(g is not None for g in torch.autograd.grad(tensor.sum(), parameters, retain_graph=True, allow_unused=True))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)
