"""Refuses scores that are not finite, naming the layer and the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Wrong = Sequence[tuple[list[int], int]]  # positions of layers, number of the batch


def refuse_not_finite(name: str, scores: torch.Tensor, wrong: Sequence[Wrong]) -> None:
    """Refuse scores that are not finite.

    Args:
        name: Name of the score.
        scores: The scores, the same on every process.
        wrong: For each process, where it found values that are not finite.

    Raises:
        ValueError: Naming the layers and, as far as `wrong` gives them, the batches.
    """
    if torch.isfinite(scores).all():
        return
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    where = [
        f"layers {layers} in batch {number}{f' of process {process}' if len(wrong) > 1 else ''}"
        for process, places in enumerate(wrong)
        for layers, number in places
    ]
    raise ValueError(
        f"Expected finite scores by {name!r}, got {scores.tolist()}: not finite for "
        f"{'; '.join(where) or f'layers {bad}'}. The loss has diverged, or the calibration set holds an example that the "
        "model cannot score."
    )
