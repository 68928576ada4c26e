"""How far the scores of single batches lie apart: whether other examples would order the layers in another way."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def standard_error(of_batches: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The standard error of each layer's mean over batches, without what the layers of a batch have in common.

    Hard examples raise the loss without any layer alike, which orders no layers. So of each batch's scores their mean is
    taken off, with Morey's factor for the freedom that this takes (Cousineau, TQMP 1, 2005; Morey, TQMP 4, 2008).

    Args:
        of_batches: The scores on each batch, of shape (layers,).

    Returns:
        Of shape (layers,); None of fewer than two batches or layers, of which nothing can be said.
    """
    if len(of_batches) < 2 or len(of_batches[0]) < 2:
        return None
    scores = torch.stack([batch.double() for batch in of_batches])
    batches, layers = scores.shape
    variance = (scores - scores.mean(dim=1, keepdim=True)).var(dim=0) * layers / (layers - 1)
    return (variance / batches).sqrt()
