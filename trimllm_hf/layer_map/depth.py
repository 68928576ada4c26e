"""Where a config says how deep a model is, and for an encoder-decoder which of its two stacks is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..utils import is_count, shown

PARTS = ("decoder", "encoder")
LAYERS_BEHIND = re.compile(r"num_nextn_predict_layers|num_mtp_layers|mtp_num_(hidden_)?layers|num_mtp_modules")
_FLAT = {  # where one config describes both stacks
    "decoder": ("decoder_layers", "num_decoder_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
}


def resolve_part(config: PreTrainedConfig, part: str | None = None) -> str | None:
    """The stack that is meant: of an encoder-decoder the one that was trimmed, else the decoder; None: there is but one.

    Raises:
        ValueError: If the part is none of "decoder" and "encoder", or the model has only one stack.
    """
    if part is not None and part not in PARTS:
        raise ValueError(
            f"Expected part='decoder', 'encoder' or None, got {part!r}. For both trim twice, one after the other."
        )
    if not config.is_encoder_decoder:
        if part is not None:
            raise ValueError(
                f"Expected part=None for a model with one stack of layers ({type(config).__name__}), got {part!r}. Only "
                "an encoder-decoder has two."
            )
        return None
    plain = getattr(config, "trim", None)
    trimmed = plain.get("part") if isinstance(plain, dict) else None
    return part or (trimmed if trimmed in PARTS else "decoder")


def is_of_absent_part(config: PreTrainedConfig, plain: Any) -> bool:
    """Whether a map is of the part of an encoder-decoder that a model lacks: T5's encoder alone, of a trimmed decoder."""
    part = plain.get("part") if isinstance(plain, dict) else None
    if config.is_encoder_decoder or part not in PARTS:
        return False
    return bool((part == "decoder") != bool(getattr(config, "is_decoder", False)))


def part_config(config: PreTrainedConfig, part: str | None = None) -> PreTrainedConfig:
    """The config that holds the depth: the model's own, its text part, or one of an encoder-decoder's two."""
    part = resolve_part(config, part)
    if part is None:
        return config.get_text_config(decoder=True)
    own: Any = getattr(config, part, None)
    return own.get_text_config() if isinstance(own, PreTrainedConfig) else config


def depth_name(config: PreTrainedConfig, part: str | None = None) -> str:
    """The config's field for the depth, in `part_config`.

    Raises:
        ValueError: If one config describes two stacks and says nothing of this one's depth.
    """
    part = resolve_part(config, part)
    holder = part_config(config, part)
    if part is not None and holder is config:
        name = next((name for name in _FLAT[part] if name in vars(holder)), None)
        if name is None:
            raise ValueError(f"Expected {type(config).__name__} to hold one of {_FLAT[part]}, got none of them.")
        return name
    mapped = holder.attribute_map.get("num_hidden_layers")
    if part is None and (getattr(config, "is_decoder", False) or mapped == "encoder_layers"):
        for name in _FLAT["decoder"]:  # the decoder of an encoder-decoder's config, alone in a model
            if hasattr(holder, name):
                return name
    name = mapped or "num_hidden_layers"
    if name not in vars(holder) and "num_layers" in vars(holder):
        return "num_layers"  # LongCat: num_hidden_layers counts its attentions, two a block
    return name


def num_hidden_layers(config: PreTrainedConfig, part: str | None = None) -> int:
    """Depth by a model's config (its text part, for a multimodal one).

    Raises:
        ValueError: If the config has no whole-number depth.
    """
    depth = getattr(part_config(config, part), depth_name(config, part), None)
    if not is_count(depth) or depth < 1:
        raise ValueError(f"Expected a config with num_hidden_layers, got {type(config).__name__} with {shown(depth)}.")
    return depth


def num_layers_behind(config: PreTrainedConfig) -> int:
    """How many layers for multi-token prediction stand behind the blocks in a checkpoint's files, by the config."""
    found = [value for name, value in vars(config).items() if LAYERS_BEHIND.fullmatch(name) and is_count(value)]
    return max(found, default=0)


def base_name(config: PreTrainedConfig) -> str | None:
    """What the model of a config was loaded from: a Hub id, or the absolute path of a folder; None if it is not known."""
    name = getattr(config, "_name_or_path", "") or None
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name  # a relative path looks like an id
