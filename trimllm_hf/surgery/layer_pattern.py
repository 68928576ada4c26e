"""The pattern of the layers' kinds: whether readers that derive it from a layer's number agree with the config's list.

Gemma 3 has five sliding-window layers, then one with full attention. transformers 5 reads the kind of each layer from the
config's list; some runtimes assume full attention in every sixth layer, whatever layers are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

from .config_reader import ConfigReader

# The lists with a kind for each layer that a config class derives if its file has none.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
# In older files: the period of the rarer kind of layer.
PERIODS = ("sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval", "no_rope_layer_interval")


def periods(reader: ConfigReader) -> dict[str, int | None]:
    """For each period field that the config's class knows, the period that gives the layers' kinds; None if none does."""
    found: dict[str, int | None] = {}
    for kinds in KINDS:
        listed = (reader.now or {}).get(kinds)
        if not isinstance(listed, list):
            continue
        for word in PERIODS:
            tried = [reader.says(kinds, {word: period}) for period in (1, 2)]
            if None in tried or tried[0] == tried[1]:  # the class does not know the field
                continue
            current = reader.plain.get(word)
            candidates = [*([current] if isinstance(current, int) else []), *range(1, len(listed) + 2)]
            right = (period for period in candidates if reader.says(kinds, {word: period}) == listed)
            found[word] = next((period for period in right if reader.changes_nothing({word: period})), None)
    return found


def correct_periods(config: PreTrainedConfig) -> None:
    """Set the period fields of a config according to its list of kinds, as they will be in its file."""
    for word, period in periods(ConfigReader(config)).items():
        if period is not None and isinstance(getattr(config, word, None), int):
            setattr(config, word, period)


def unlike_default(config: PreTrainedConfig, values: Mapping[str, Any] = MappingProxyType({})) -> dict[str, tuple[Any, Any]]:
    """The lists of layers' kinds that differ from what the config's class derives by itself: as listed, and by default.

    Args:
        config: The config that holds the depth.
        values: Fields to set in it first.
    """
    reader = ConfigReader(config, values)
    found: dict[str, tuple[Any, Any]] = {}
    for kinds in KINDS:
        listed = (reader.now or {}).get(kinds)
        default = reader.says(kinds, without=PERIODS) if isinstance(listed, list) else None
        if isinstance(default, list) and default != listed:
            found[kinds] = (listed, default)
    return found


def refuse_unportable(config: PreTrainedConfig, values: Mapping[str, Any], kept: list[int]) -> None:
    """Refuse a drop after which the kinds of the layers are not what runtimes derive from a layer's number.

    Args:
        config: The config that holds the depth, before the drop.
        values: The fields that change in it.
        kept: Positions of the kept layers.

    Raises:
        ValueError: Naming the pattern.
    """
    for name, (listed, default) in unlike_default(config, values).items():
        kind = next(position for position, pair in enumerate(zip(listed, default, strict=False)) if pair[0] != pair[1])
        raise ValueError(
            f"Expected layers to stay whose kinds follow the pattern of {type(config).__name__} ({name} worked out from a "
            f"layer's number, as some runtimes do), got {listed[kind]!r} at position {kind} of {kept}, where it has "
            f"{default[kind]!r}. Drop whole periods or layers at the end, or leave portable out. Nothing was changed."
        )
