"""Reduces a batch to the positions that have a label to predict.

Where prompts have no labels, these are few, and what follows the blocks (the last norm, the head, the loss) need not run on
the others: with a large vocabulary the head costs as much as several blocks, and its logits more memory than all of them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from ..surgery.adapters import base_of
from .calibration import Batch
from .metrics import is_causal

CUT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")  # one entry per token


@dataclass(frozen=True)
class Labelled:
    """The part of a batch that has labels, or the whole batch.

    Attributes:
        batch: The batch of these positions: each row has one token more than it has labels. The labels of each row are those
            of the whole batch, so a causal model's loss on these hidden states is the same.
        positions: Their positions in the whole batch, of shape (rows, positions); None: all.
    """

    batch: Batch
    positions: torch.Tensor | None = None

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Select the states (or logits) at the positions: from shape (rows, tokens, size) to (rows, positions, size)."""
        if self.positions is None:
            return states
        return states.gather(1, self.positions.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))


def labelled(model: nn.Module, batch: Batch) -> Labelled:
    """Reduce a batch of a causal language model; a batch of another model or form is left whole."""
    labels = batch.get("labels")
    if not is_causal(model) or labels is None or labels.dim() != 2 or labels.shape[1] < 2:
        return Labelled(batch)
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() > 1}
    if not {"input_ids", "labels"} <= set(tensors) <= {*CUT, "labels"}:
        return Labelled(batch)
    if any(value.shape != labels.shape for value in tensors.values()):
        return Labelled(batch)
    asked = labels[:, 1:] != -100  # a causal model predicts each token at the previous position
    most = max(1, int(asked.sum(dim=1).max()))
    positions = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    predicted = labels[:, 1:].gather(1, positions)  # -100 where a row has fewer labels than the most
    positions = torch.cat([positions, positions[:, -1:]], dim=1)
    cut = {name: value.gather(1, positions.to(value.device)) for name, value in tensors.items() if name != "labels"}
    first = torch.full_like(predicted[:, :1], -100)
    return Labelled({**batch, **cut, "labels": torch.cat([first, predicted], dim=1)}, positions)


def headless(model: nn.Module, batch: Batch) -> Batch:
    """The batch for a pass whose output is not used: logits of one position if the model supports it, and no loss."""
    if not is_causal(model) or "logits_to_keep" not in inspect.signature(base_of(model).forward).parameters:
        return batch
    return {**{name: value for name, value in batch.items() if name != "labels"}, "logits_to_keep": 1}
