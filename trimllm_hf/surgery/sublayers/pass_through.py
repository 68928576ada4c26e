"""`PassThrough`: a module without parameters that replaces a dropped sublayer, or a norm that only it needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OutputSpec:
    """What a pass-through returns.

    Attributes:
        argument: The index of the tensor argument that it returns; None: zeros of the first one's shape.
        rest: How many Nones follow in a tuple, if the module returned one; None: a plain tensor.
    """

    argument: int | None = None
    rest: int | None = None

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result for a call's arguments."""
        result = self.hidden(args, kwargs)
        return result if self.rest is None else (result, *[None] * self.rest)

    def hidden(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The tensor in the result for a call's arguments."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return torch.zeros_like(tensors[0]) if self.argument is None else tensors[self.argument]


class PassThrough(nn.Module):
    """Replaces a dropped module: it has no parameters, computes nothing and writes nothing to the cache."""

    def __init__(self, spec: OutputSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.spec(args, kwargs)

    def set_attention_type(self, *_: Any, **__: Any) -> None:
        """No-op: BigBird switches the type of its attentions for short inputs."""

    def extra_repr(self) -> str:
        what = "zeros" if self.spec.argument is None else f"argument {self.spec.argument}"
        return what if self.spec.rest is None else f"{what}, and {self.spec.rest} x None"
