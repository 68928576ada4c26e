"""The weights of a sliced model: gains folded, hidden states rotated into other bases and cut (SliceGPT, arXiv 2401.15024).

All products are computed in float64. With Q the basis of a block's input, Q' that of the next block's, g and b a norm's gain
and shift, and W of shape (outputs, inputs): a matrix that reads becomes W diag(g) Q, with W b added to its bias; one that
writes becomes Qᵀ W in the attention and Q'ᵀ W in the MLP (in a parallel block, Q'ᵀ W in both); the shortcut multiplies
hidden states (tokens, width) by Qᵀ Q'; the table of embeddings is multiplied by the first block's Q. Before LayerNorms, the
mean over the hidden dimension is first removed from the table and from what the matrices write, so that the norms only
have to divide. A basis with fewer columns cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .modules import SHORTCUT
from .wiring import Block

ROWS = 1024  # of a table, processed at a time in float64


@dataclass(frozen=True)
class Gain:
    """What a norm does besides dividing.

    Attributes:
        gain: Of shape (width,), float64.
        shift: Its bias, float64, or None.
        centred: Whether it subtracts the mean first.
    """

    gain: torch.Tensor
    shift: torch.Tensor | None
    centred: bool


def read_gain(norm: nn.Module, width: int, eps: float) -> Gain:
    """Find what a norm does besides dividing by probing it: some multiply by their weight, some by 1 + weight.

    Raises:
        ValueError: If it is neither an RMSNorm nor a LayerNorm.
    """
    parameters = dict(norm.named_parameters(recurse=False))
    where = next((p for p in norm.parameters()), torch.empty(0))

    @torch.no_grad()
    def ask(values: torch.Tensor) -> torch.Tensor:
        return norm(values.to(where.device, where.dtype)[None, None])[0, 0].double().cpu()

    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    signs[-1] *= width % 2 == 0  # so that their mean is 0
    size = signs.pow(2).mean()
    shift = ask(torch.zeros(width))
    seen = (ask(signs) - shift) * signs * torch.sqrt(size + eps)
    weight = parameters.get("weight")
    candidates = [torch.ones(width, dtype=torch.float64)]
    if weight is not None:
        candidates = [weight.detach().double().cpu(), 1 + weight.detach().double().cpu()]
    tolerance = 1e-5 if where.dtype in (torch.float32, torch.float64) else 2e-2
    known = signs != 0
    fits = [c for c in candidates if torch.allclose(c[known], seen[known], rtol=tolerance, atol=tolerance)]
    constant = ask(torch.ones(width)) - shift
    centred = bool(constant.abs().max() <= tolerance)
    bias = parameters.get("bias")
    exact = None if bias is None else bias.detach().double().cpu()
    right = torch.allclose(shift, torch.zeros_like(shift) if exact is None else exact, atol=tolerance)
    small = signs * (eps / size).sqrt() if eps else signs
    asked = (ask(small) - shift) * signs
    if (
        not fits
        or not right
        or not torch.allclose(
            asked[known],
            (fits[0] * small.abs() / torch.sqrt(small.pow(2).mean() + eps))[known],
            rtol=10 * tolerance,
            atol=1e-4,
        )
    ):
        raise ValueError(
            f"Expected an RMSNorm or a LayerNorm, got {type(norm).__name__}, which does something else. This architecture "
            "cannot be sliced; what='mlp' may do. Nothing was changed."
        )
    return Gain(fits[0], exact, centred)


Tensors = Iterator[tuple[str, torch.Tensor]]


def rotated_block(
    module: nn.Module, block: Block, gains: dict[str, Gain], basis: torch.Tensor, after: torch.Tensor
) -> Tensors:
    """The tensors of a sliced block, by their names in it, from those of the stock one.

    Args:
        module: The stock block.
        block: What reads and writes the hidden states in it.
        gains: Of its norms.
        basis: Q of shape (width, kept), orthonormal, float64.
        after: Q of the next block.
    """
    centred = any(gain.centred for gain in gains.values())
    for half, out in ((block.attention, after if block.parallel else basis), (block.mlp, after)):
        for name in half.readers:
            for kind, tensor in rotated_reader(module.get_submodule(name), gains[half.norm], basis):
                yield f"{name}.{kind}", tensor
        yield from _writer(half.writer, module.get_submodule(half.writer), centred, out)
    yield f"{SHORTCUT}.weight", (basis.T @ after).T


def rotated_embedding(module: Any, basis: torch.Tensor, centred: bool) -> torch.Tensor:
    """A sliced table of embeddings."""
    return _rows(module.weight.data, basis, centred)


def rotated_reader(module: Any, gain: Gain, basis: torch.Tensor) -> Tensors:
    """The weight, and the bias if there is one, of a matrix that reads a norm's output."""
    weight: torch.Tensor = module.weight.data
    rows = weight.T if isinstance(module, Conv1D) else weight
    made = _rows(rows, gain.gain.to(basis.device)[:, None] * basis, False)
    yield "weight", made.T if isinstance(module, Conv1D) else made
    bias = getattr(module, "bias", None)
    if gain.shift is not None:
        shift = _rows(rows, gain.shift.to(basis.device)[:, None], False, keep=True)[:, 0]
        yield "bias", shift if bias is None else shift + bias.data.double()
    elif bias is not None:
        yield "bias", bias.data


def _writer(name: str, module: Any, centred: bool, basis: torch.Tensor) -> Tensors:
    weight: torch.Tensor = module.weight.data
    columns = (weight if isinstance(module, Conv1D) else weight.T).double()  # (inputs, width)
    if centred:
        columns = columns - columns.mean(1, keepdim=True)
    made = columns @ basis
    yield f"{name}.weight", made if isinstance(module, Conv1D) else made.T
    bias = getattr(module, "bias", None)
    if bias is not None:
        wide = bias.data.double()
        yield f"{name}.bias", (wide - wide.mean() if centred else wide) @ basis


def _rows(table: torch.Tensor, factor: torch.Tensor, centred: bool, keep: bool = False) -> torch.Tensor:
    """A table times a factor, some rows at a time."""
    dtype = torch.float64 if keep else table.dtype
    made = torch.empty(len(table), factor.shape[1], dtype=dtype, device=table.device)
    for start in range(0, len(table), ROWS):
        part = table[start : start + ROWS].double()
        part = part - part.mean(1, keepdim=True) if centred else part
        made[start : start + ROWS] = part @ factor
    return made
