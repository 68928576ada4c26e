"""The bases: principal components of the hidden states."""

from __future__ import annotations

import torch

DAMPING = 0.01  # of the mean of the diagonal


class Covariance:
    """The sum of x xᵀ over tokens, in float64."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the hidden states of a batch's real tokens.

        Args:
            states: Of shape (rows, tokens, width).
            mask: Of shape (rows, tokens): 0 where padding is.
        """
        rows = states.flatten(0, 1) if mask is None else states[mask.to(states.device) != 0]
        for part in rows.split(4096):
            wide = part.double()
            self.sum += wide.T @ wide

    def basis(self, width: int, centred: bool = False) -> torch.Tensor:
        """The directions that hold most of the states, the most important first: of shape (full width, width), float64.

        Eigenvectors of the sum, damped on the diagonal as SliceGPT does (arXiv 2401.15024, section 3.3).

        Args:
            width: How many directions.
            centred: Whether the mean over each token's numbers does not count: a LayerNorm takes it away.
        """
        total = self.sum
        if centred:
            total = total - total.mean(0, keepdim=True)
            total = total - total.mean(1, keepdim=True)
        diagonal = total.diagonal()
        damped = total + DAMPING * diagonal.mean() * torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
        vectors = torch.linalg.eigh(damped).eigenvectors  # ascending
        return vectors.flip(1)[:, :width].contiguous()


def random_basis(width: int, seed: int) -> torch.Tensor:
    """A random rotation, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
