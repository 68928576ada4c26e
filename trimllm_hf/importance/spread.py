"""How much scores vary between batches: whether other examples would rank the layers differently."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def standard_error(of_batches: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The standard error of each layer's mean over batches, without the effects common to all layers of a batch.

    Hard examples raise the loss without any layer by the same amount, which does not affect the ranking. So the mean of each
    batch's scores is subtracted, with Morey's correction factor (Cousineau, TQMP 1, 2005; Morey, TQMP 4, 2008).

    Args:
        of_batches: The scores on each batch, of shape (layers,).

    Returns:
        Of shape (layers,); None for fewer than two batches or layers, where it is undefined.
    """
    if len(of_batches) < 2 or len(of_batches[0]) < 2:
        return None
    scores = torch.stack([batch.double() for batch in of_batches])
    batches, layers = scores.shape
    variance = (scores - scores.mean(dim=1, keepdim=True)).var(dim=0) * layers / (layers - 1)
    return (variance / batches).sqrt()
