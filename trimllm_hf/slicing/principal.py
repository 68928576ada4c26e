"""The bases: principal components of the hidden states."""

from __future__ import annotations

import torch

DAMPING = 0.01  # relative to the mean of the diagonal


def refuse_not_finite(values: torch.Tensor) -> None:
    """Refuse sums of hidden states that are not finite.

    Raises:
        ValueError: If some are not.
    """
    if not values.isfinite().all():
        raise ValueError(
            "Expected hidden states that are finite numbers on the calibration batches, got others. Load the model in "
            "float32 or bfloat16. Nothing was changed."
        )


class Covariance:
    """The sum of x xᵀ over tokens: accumulated in float64, from products over a few thousand tokens in float32."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the hidden states of a batch's real tokens.

        Args:
            states: Of shape (rows, tokens, width).
            mask: Of shape (rows, tokens); 0 at padding.
        """
        rows = states.flatten(0, 1) if mask is None else states[mask.to(states.device) != 0]
        for part in rows.split(4096):
            wide = part if part.dtype == torch.float64 else part.float()
            self.sum += wide.T @ wide

    def basis(self, width: int, centred: bool = False) -> torch.Tensor:
        """The directions with the largest second moments, the largest first: of shape (full width, width), float64.

        Eigenvectors of the sum (SliceGPT, arXiv 2401.15024, section 3.3). As in its code the diagonal is damped, which only
        matters to the numerics.

        Args:
            width: How many directions.
            centred: Whether to remove the mean over each token's hidden state first, as a LayerNorm does.

        Raises:
            ValueError: If states were not finite.
        """
        refuse_not_finite(self.sum)
        total = self.sum
        if centred:
            total = total - total.mean(0, keepdim=True)
            total = total - total.mean(1, keepdim=True)
        diagonal = total.diagonal()
        damped = total + DAMPING * diagonal.mean() * torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
        vectors = torch.linalg.eigh(damped).eigenvectors  # ascending
        return vectors.flip(1)[:, :width].contiguous()


def random_basis(width: int, seed: int) -> torch.Tensor:
    """A random rotation in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
