"""What the processes of a run decide together, by nothing but a sum over them."""

from __future__ import annotations

from collections.abc import Callable

import torch

Agree = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over the processes, the same on each of them


def on_any(agree: Agree, here: bool) -> bool:
    """Whether it is so on any process."""
    return bool(agree(torch.tensor([float(here)], dtype=torch.float64)).item() > 0)


def least_and_most(agree: Agree, number: int) -> tuple[int, int]:
    """The least and the greatest of the processes' numbers, each at least 0."""
    total = int(agree(torch.tensor([float(number)], dtype=torch.float64)).item())
    votes = torch.zeros(total + 1, dtype=torch.float64)
    votes[number] = 1
    cast = agree(votes).nonzero().flatten().tolist()
    return cast[0], cast[-1]
