"""What a model would weigh at every depth, from its config alone: to choose a target before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..surgery.blocks import find_blocks
from ..surgery.custom_models import class_for
from .sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Depth:
    """A model with some of its blocks left.

    Attributes:
        num_layers: Blocks left.
        parameters: Number of parameters, shared ones once.
        weight_bytes: Bytes of parameters and buffers.
        kv_cache_bytes_per_token: Growth of the cache per token and sequence; None where there is none.
        byte_bound: The ratio of the weight bytes read for each token: at full depth / at
            this depth. None where not all weights are read, or nothing is decoded.
    """

    num_layers: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes_per_token: float | None
    byte_bound: float | None


def depths(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> tuple[list[Depth], bool]:
    """Every depth from that of the config down to 1, and whether all blocks weigh the same.

    Where they do not, a depth stands for dropping blocks of average weight: it then depends on which ones go.

    Args:
        config: Of the model; no weights are read, and none are made (it is built on the meta device).
        dtype: Of the weights; the config's by default.

    Raises:
        ValueError: If the model has not one stack of blocks.
    """
    model = with_random_weights(config, dtype, "meta")
    model.set_experts_implementation("batched_mm")  # of experts, the one that runs on meta with every dtype
    blocks = find_blocks(model).blocks
    whole, depth = sizes_of(model), len(blocks)
    held = [[*block.parameters(), *block.buffers()] for block in blocks]
    parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
    weights = [sum(tensor.nbytes for tensor in tensors) for tensors in held]
    made = []
    for left in range(depth, 0, -1):
        gone = (depth - left) / depth
        lighter = round(gone * sum(weights))
        cache, read = whole.kv_cache_bytes_per_token, whole.decode_bytes
        made.append(
            Depth(
                num_layers=left,
                parameters=whole.parameters - round(gone * sum(parameters)),
                weight_bytes=whole.weight_bytes - lighter,
                kv_cache_bytes_per_token=None if cache is None else cache * left / depth,
                byte_bound=None if read is None else read / (read - lighter),
            )
        )
    return made, len(set(weights)) == 1


def depths_between(base: Sizes, ours: Sizes) -> list[Depth]:
    """Every depth of a base, from what it weighs and what it weighs with fewer layers; layers are taken to be alike.

    Raises:
        ValueError: If the second has as many layers, so that nothing is known of one.
    """
    gone = base.num_layers - ours.num_layers
    if gone < 1:
        raise ValueError(f"Expected a model of fewer layers than {base.num_layers}, got one of {ours.num_layers}.")

    def at(name: str, left: int) -> float | None:
        whole, less = getattr(base, name), getattr(ours, name)
        return None if whole is None or less is None else whole - (whole - less) * (base.num_layers - left) / gone

    found = []
    for left in range(base.num_layers, 0, -1):
        read = at("decode_bytes", left)
        found.append(
            Depth(
                num_layers=left,
                parameters=round(at("parameters", left) or 0),
                weight_bytes=round(at("weight_bytes", left) or 0),
                kv_cache_bytes_per_token=at("kv_cache_bytes_per_token", left),
                byte_bound=(base.decode_bytes or 0) / read if read else None,
            )
        )
    return found


def with_random_weights(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model that a config describes, of the class that it names; on "meta" it takes no memory.

    Raises:
        ValueError: If it names none, and is not that of a causal language model.
    """
    kind = dtype or config.dtype or torch.float32
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:
        if not hasattr(config, "auto_map") and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"Expected a config that names a class of transformers, or one of a causal language model, got one of type "
                f"{config.model_type} with architectures {config.architectures}. Name the class in config.json."
            )
        build: Any = AutoModelForCausalLM.from_config
    else:
        build = class_for(named, config)._from_config  # it may lack sublayers, or be sliced
    with torch.device(device):
        model: PreTrainedModel = build(config, dtype=kind)
    return model
