"""How a model is called: by a loss function of the user's, or with positional arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..surgery.adapters import base_of

Inputs = dict[str, Any]  # the arguments of a forward call, by name

# Types of arguments besides tensors that have no rows. Anything else (a cache, a block mask) may hold one entry per row.
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
# Row counts of sequences that share a row: repeating rows does not repeat the sequences.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
BROADCAST = ("attention_mask", "position_ids")  # may have a single row for all


def named(module: nn.Module, args: Sequence[Any], kwargs: Inputs) -> Inputs:
    """The arguments of a call by their names."""
    names = inspect.signature(base_of(module).forward).parameters if args else ()  # a PeftModel's own forward may take *args
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextmanager
def noted_calls(module: nn.Module) -> Iterator[list[Inputs]]:
    """Record the arguments that a module is called with."""
    calls: list[Inputs] = []

    def note(called: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        calls.append(named(called, args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def has_independent_rows(model: nn.Module, inputs: Inputs, rows: int) -> bool:
    """Whether all arguments of a call are given row by row, so that rows can be added.

    That is not so where sequences share a row (packing), or where the number of entries differs from the number of rows:
    the image patches of Qwen-VL, three kinds of position.
    """
    if any(name in inputs for name in PACKED):
        return False
    if "flash" in (getattr(model.config, "_attn_implementation", None) or "") and "position_ids" in inputs:
        return False  # flash attention detects packed sequences only in a single row
    return all(
        value.dim() == 0 or len(value) == rows or (len(value) == 1 and name in BROADCAST)
        if isinstance(value, torch.Tensor)
        else isinstance(value, PLAIN)
        for name, value in inputs.items()
    )


def repeated(inputs: Inputs, rows: int) -> Inputs:
    """A call with each row twice."""
    return {
        name: torch.cat([value, value])
        if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
        else value
        for name, value in inputs.items()
    }
