"""What a model weighs: parameters, bytes, cache; and the ratio of the bytes read per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..layer_map import num_hidden_layers
from ..utils import evaluating


@dataclass(frozen=True)
class Sizes:
    """What a model weighs.

    Attributes:
        num_layers: Its depth.
        parameters: Number of parameters, shared ones once.
        weight_bytes: Bytes of parameters and buffers in memory, shared ones once.
        decode_bytes: The part of them that is read for each decoded token: all but the table of input embeddings, of
            which one row is read. None where not all weights are read (mixture of experts; an encoder-decoder, whose
            encoder is read once) or nothing is decoded.
        kv_cache_bytes_per_token: Growth of the cache per token and sequence; None where there is none. Of an
            encoder-decoder, per token that is written.
    """

    num_layers: int
    parameters: int
    weight_bytes: int
    decode_bytes: int | None
    kv_cache_bytes_per_token: float | None


def sizes_of(model: PreTrainedModel) -> Sizes:
    """What a model weighs; see `Sizes`. Works for one on the meta device too."""
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is getattr(embedding, "weight", None)
    experts = any(getattr(model.config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    weights = [*model.parameters(), *model.buffers()]
    total = sum(tensor.nbytes for tensor in weights)
    decode = None
    if model.can_generate() and embedding is not None and not experts and not model.config.is_encoder_decoder:
        decode = total - (0 if tied else sum(tensor.nbytes for tensor in embedding.parameters()))
    return Sizes(
        num_layers=num_hidden_layers(model.config),
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        weight_bytes=total,
        decode_bytes=decode,
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(model) if model.can_generate() else None,
    )


def byte_bound(base: Sizes, trimmed: Sizes) -> float | None:
    """Speed-up of decoding if time went with weight bytes alone: those read per token of the base / of the trimmed model.

    With blocks of equal size it is 1 / (1 - f*s), f the share of blocks dropped, s the blocks' share of those bytes.
    """
    if base.decode_bytes is None or trimmed.decode_bytes is None:
        return None
    return base.decode_bytes / trimmed.decode_bytes


def kv_cache_bytes_per_token(model: PreTrainedModel, length: int = 8) -> float | None:
    """Bytes by which the cache grows per token of a sequence, seen in a forward pass over `length` tokens.

    Works on the meta device. None where the model keeps no keys and values.
    """
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with torch.no_grad(), evaluating([model]):  # in training mode, gradient checkpointing would turn the cache off
        both = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        output = model(input_ids=tokens, use_cache=True, **both)
    cache = output.get("cache") or output.get("past_key_values")  # its name before transformers 5.24
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not layers:
        return None
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)) / length
