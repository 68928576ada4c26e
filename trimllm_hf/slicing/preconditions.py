"""Checks before a model is sliced."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layer_map import LayerMap
from ..surgery.adapters import adapters_of
from .slice_map import ALLOCATIONS, KINDS, MEANS, SliceMap


def refuse_arguments(ratio: float, allocation: str, spread: float, mean: str, multiple: int, what: str) -> None:
    """Refuse arguments out of range.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ValueError(f"Expected a ratio between 0 and 1, the share to cut, got {ratio!r}.")
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread <= 1:
        raise ValueError(f"Expected a spread from 0 (uniform) to 1, got {spread!r}.")
    named = (("allocation", allocation, ALLOCATIONS), ("mean", mean, MEANS), ("what", what, tuple(KINDS)))
    for name, value, known in named:
        if value not in known:
            raise ValueError(f"Expected {name} to be one of {list(known)}, got {value!r}.")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"Expected a multiple of at least 1, got {multiple!r}. 8 and 64 suit a GPU.")


def refuse_model(model: nn.Module) -> PreTrainedModel:
    """Refuse a model that cannot be sliced as it is.

    Returns:
        The model.

    Raises:
        ValueError: With the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Expected a transformers model, not wrapped, got {type(model).__name__}. Slice the model before an engine, "
            "PEFT or torch.compile wraps it. Nothing was changed."
        )
    name = type(model).__name__
    if SliceMap.from_config(model.config) is not None:
        raise ValueError(
            f"Expected a model that is not sliced, got {name} with config.slicing. Slice its base. Nothing was changed."
        )
    if adapters_of(model):
        raise ValueError(f"Expected a model without adapters, got {name} with some. Merge them first. Nothing was changed.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"Expected weights that are floating-point numbers, got a quantized {name}. Slice first, then quantize. Nothing "
            "was changed."
        )
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"Expected a model in memory, got {name} on the meta device. Load its weights. Nothing was changed."
        )
    if len({tensor.device for tensor in tensors}) > 1 or any(type(p) is not nn.Parameter for p in model.parameters()):
        raise ValueError(
            f"Expected a model on one device, not in shards, got parts of {name} in several places. Load it without "
            "device_map, and slice it before an engine prepares it. Nothing was changed."
        )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected a causal language model, with a head that makes logits, got {name}. Slice it as one, save it, and "
            "load what you need from there. Nothing was changed."
        )
    if not LayerMap.from_config(model.config).has_all_sublayers:
        raise ValueError(
            f"Expected blocks with an attention and an MLP each, got {name} that lacks some. Slice a model that lost whole "
            "blocks at most. Nothing was changed."
        )
    if _is_trained(model):
        raise ValueError(
            f"Expected a model that is not being trained, got {name} with an optimizer: it would go on with the old "
            "weights. Slice before the Trainer or the optimizer is made. Nothing was changed."
        )
    return model


def refuse_tied(model: nn.Module) -> None:
    """Refuse a model whose head is tied to its embedding: the two are rotated by different bases.

    Raises:
        ValueError: If it is.
    """
    stock: Any = refuse_model(model)
    if stock.get_output_embeddings().weight is stock.get_input_embeddings().weight:
        raise ValueError(
            f"Expected a head of its own, since it may not be untied, got a {type(model).__name__} whose head is its "
            "embedding. Allow untie, or cut what='mlp'. Nothing was changed."
        )


def _is_trained(model: nn.Module) -> bool:
    """Whether an optimizer holds one of the model's parameters, or one has a gradient."""
    own = {id(parameter) for parameter in model.parameters()}
    if any(parameter.grad is not None for parameter in model.parameters()):
        return True
    optimizers = [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]
    return any(id(p) in own for found in optimizers for group in found.param_groups for p in group["params"])


def on_device(batches: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The batches, moved to the model's device."""
    return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in batches]


def real_tokens(batches: Sequence[dict[str, Any]], width: int) -> int:
    """The number of tokens that are not padding.

    Raises:
        ValueError: If there are too few for that many directions, or a batch has none, or a batch has no input_ids.
    """
    counts = []
    for number, batch in enumerate(batches):
        tokens = batch.get("input_ids") if isinstance(batch, dict) or hasattr(batch, "get") else None
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            raise ValueError(f"Expected batches with input_ids of shape (rows, tokens), got none in batch {number}.")
        mask = batch.get("attention_mask")
        counts.append(tokens.numel() if mask is None else int((mask != 0).sum()))
        if counts[-1] == 0:
            raise ValueError(f"Expected tokens in every batch, got only padding in batch {number}. Leave it out.")
    if sum(counts) < width:
        raise ValueError(
            f"Expected at least {width} tokens, as many as the hidden states are wide, to find their principal components, "
            f"got {sum(counts)}. Give more calibration batches; some ten times as many is usual."
        )
    return sum(counts)
