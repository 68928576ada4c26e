"""How the config of a model that lacks sublayers is saved: so that code which does not know such models refuses it.

In config.json the `model_type` is not the base's, and the field of the depth holds a sentence. Stock transformers then
refuses the unknown type, and a class named outright (`LlamaForCausalLM.from_pretrained`) refuses a depth that is no number:
neither fills the missing weights with random ones.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...layer_map import MODEL_TYPE, LayerMap, depth_name, part_config
from ...utils import shown

GONE = "some layers lack their attention or MLP (see trim): run `import trimllm_hf` before loading this model"
PREFIX = "Trimmed"  # of the architecture's name


def to_saved_config(plain: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The dict to save in config.json, from that of a stock config.

    Raises:
        ValueError: If the config does not hold the depth as a number.
    """
    plain = copy.deepcopy(plain)
    holder: Any = plain
    for name in _path(config, part_config(config)):
        holder = holder[name]
    if depth_name(config) not in vars(part_config(config)):
        raise ValueError(
            f"Expected {type(config).__name__} to hold its depth as a number, got none. Sublayers of this architecture "
            "cannot be dropped: use unit='block'."
        )
    holder[depth_name(config)] = GONE
    names = [PREFIX + name.removeprefix(PREFIX) for name in plain.get("architectures") or ()]
    return {**plain, "model_type": MODEL_TYPE, "base_model_type": plain["model_type"], "architectures": names or None}


def from_saved_config(plain: dict[str, Any]) -> dict[str, Any]:
    """The stock config's dict, from a saved one; nothing in it is trusted.

    Raises:
        ValueError: If it is damaged.
    """
    layer_map = LayerMap.from_dict(plain.get("trim"))
    if layer_map.has_all_sublayers:
        raise ValueError(
            "Expected config.trim to name the layers that lack a sublayer, as the model_type says, got one of whole layers "
            f"{shown(layer_map.kept_layers)}. The config was changed by hand or is damaged."
        )
    base = plain.get("base_model_type")
    if not isinstance(base, str) or base == MODEL_TYPE or base not in CONFIG_MAPPING:
        raise ValueError(f"Expected base_model_type to be a model type that transformers knows, got {shown(base)}.")
    found = _with_depth(plain, layer_map.num_layers)
    names = found.get("architectures")
    if isinstance(names, list):
        found["architectures"] = [name.removeprefix(PREFIX) for name in names if isinstance(name, str)]
    del found["base_model_type"]
    return {**found, "model_type": base}


def _path(config: PreTrainedConfig, holder: PreTrainedConfig) -> list[str]:
    """The path of attributes from the model's config to one of its sub-configs."""
    if holder is config:
        return []
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            try:
                return [name, *_path(part, holder)]
            except ValueError:
                continue
    raise ValueError(f"Expected {type(config).__name__} to hold its text part, got none.")


def _with_depth(plain: Any, depth: int) -> Any:
    if isinstance(plain, dict):
        return {name: _with_depth(value, depth) for name, value in plain.items()}
    return depth if plain == GONE else plain
