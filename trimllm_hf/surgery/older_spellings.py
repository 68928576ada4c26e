"""Adds older spellings to a trimmed model's config.json, so that tools that read the base read it in the same way.

transformers 5 writes `rope_parameters` and `dtype`, and leaves out what its own classes no longer accept. Configs on the
Hub, transformers 4, mlx-lm and others use `rope_theta`, `rope_scaling`, `torch_dtype` and more, and if these are missing,
readers fall back to their own defaults. Each older name written here is checked with transformers' own reader of older
files: read in place of the new names it gives the same values, and read beside them it changes nothing. What cannot be
checked is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file  # type: ignore[attr-defined]  # re-exported there

from .candidate_configs import names_layers
from .config_reader import ConfigReader, Plain
from .layer_pattern import PERIODS, periods

ROPE, TYPES = "rope_parameters", "layer_types"
# In older files: the base of the rotary frequencies, that of sliding layers, and the share of a head that is rotated.
_ROPE_WORDS = (
    ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
    ("rope_theta", None, "partial_rotary_factor"),
    ("global_rope_theta", "local_rope_theta", "partial_rotary_factor"),  # ModernBERT
    ("rotary_emb_base", None, "rotary_pct"),  # GPT-NeoX
)
# Properties of the file and not of the model, or handled elsewhere.
_NOT_KEPT = {
    *("model_type", "transformers_version", "transformers_weights", "auto_map", "trim"),
    *(TYPES, ROPE, "torch_dtype", "quantization_config"),
}


def with_older_spellings(
    plain: Mapping[str, Any], config: PreTrainedConfig, of_base: Mapping[str, Any] | None = None
) -> Plain:
    """The contents of config.json with older spellings added.

    Args:
        plain: What transformers writes.
        config: The config it was written from.
        of_base: The contents of the base's config.json, if available. Each name in it is kept with the trimmed model's
            value, or left out if no value is right.
    """
    found, of_base = dict(plain), of_base or {}
    for name in config.sub_configs:
        part, of_part = getattr(config, name, None), of_base.get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(found.get(name), dict):
            found[name] = with_older_spellings(found[name], part, of_part if isinstance(of_part, dict) else None)
    if isinstance(found.get("dtype"), str):
        found["torch_dtype"] = found["dtype"]
    reader = ConfigReader(config)
    if reader.now is None:
        return found  # custom code that cannot be read back: nothing can be checked
    found |= _rope(reader)
    for word, period in periods(reader).items():
        found.pop(word, None)
        if period is not None:
            found[word] = period
    return found | _of_base(reader, found, of_base)


def _rope(reader: ConfigReader) -> Plain:
    """The settings of rotary embeddings in older spellings."""
    assert reader.now is not None
    parameters = reader.now.get(ROPE)
    if not isinstance(parameters, dict) or not parameters:
        return {}
    found: Plain = {}
    for words in _ROPE_WORDS:
        for spelling in _rope_spellings(parameters, words):
            other = _rope_spellings(_doubled(parameters), words)
            proved = reader.says(ROPE, spelling) == parameters and reader.changes_nothing(spelling)
            # a class that does not know the names uses its defaults, which may be these values; OLMo 3 reads one name twice
            read = [reader.says(ROPE, each) for each in other] if proved else []
            if _doubled(parameters) in read or (words[1] is None and any(each != parameters for each in read)):
                found |= spelling
                break
    return found


def _rope_spellings(parameters: Plain, words: tuple[str, str | None, str]) -> Iterator[Plain]:
    """One spelling, or a shorter and a longer one."""
    theta, local_theta, share = words
    whole = parameters.get("full_attention", parameters)
    found: Plain = {}
    if whole is not parameters:
        local = parameters.get("sliding_attention")
        if not isinstance(local, dict) or not isinstance(whole, dict):
            return
        if local_theta is not None:
            found[local_theta] = local.get("rope_theta")
    found[theta] = whole.get("rope_theta")
    if "partial_rotary_factor" in whole:
        found[share] = whole["partial_rotary_factor"]
    rest = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if rest.keys() <= {"rope_type"} and rest.get("rope_type", "default") == "default":
        rest = {}
    # transformers fills it in by itself, and others then assume a scale of 1
    shorter = {name: value for name, value in rest.items() if name != "original_max_position_embeddings"}
    for scaling in dict.fromkeys(map(json.dumps, (shorter, rest))):
        yield {**found, "rope_scaling": json.loads(scaling) or None}


def _doubled(parameters: Plain) -> Plain:
    """Settings with different bases."""
    return {
        name: _doubled(value) if isinstance(value, dict) else value * 2 if name == "rope_theta" else value
        for name, value in parameters.items()
    }


def _of_base(reader: ConfigReader, found: Plain, of_base: Mapping[str, Any]) -> Plain:
    """Names in the base's file that are missing here, and its names for the layers' kinds."""
    assert reader.now is not None
    kept: Plain = {}
    depth = of_base.get("num_hidden_layers", of_base.get(reader.config.attribute_map.get("num_hidden_layers", "")))
    text: Plain = next((found[name] for name in ("text_config", "llm_config") if isinstance(found.get(name), dict)), {})
    for name, value in of_base.items():
        if name in found or name.startswith("_") or name in _NOT_KEPT or name in PERIODS:
            continue
        if name in text:
            kept[name] = text[name]  # older files give it for the model
            continue
        if name in reader.now:
            kept[name] = reader.now[name]  # a default, which transformers does not write
            continue
        if name in reader.config.attribute_map:
            kept[name] = getattr(reader.config, name)
            continue
        if not (isinstance(depth, int) and names_layers(name, value, depth)) and reader.changes_nothing({name: value}):
            kept[name] = value
    words, kinds = of_base.get(TYPES), found.get(TYPES)
    if isinstance(words, list) and isinstance(kinds, list) and all(isinstance(word, str) for word in words):
        newer = {word: (reader.says(TYPES, {TYPES: [word] * len(kinds)}) or [word])[0] for word in set(words)}
        older = {kind: word for word, kind in newer.items()}
        renamed = [older.get(kind, kind) for kind in kinds]
        if renamed != kinds and reader.says(TYPES, {TYPES: renamed}) == reader.now.get(TYPES):
            kept[TYPES] = renamed
    return kept


def add_to(file: str | Path, config: PreTrainedConfig, of_base: Mapping[str, Any] | None = None) -> None:
    """Add older spellings to a config.json that transformers has written; `of_base` as in `with_older_spellings`."""
    plain = json.loads(Path(file).read_text(encoding="utf-8"))
    found = with_older_spellings(plain, config, file_of(config) if of_base is None else of_base)
    Path(file).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def file_of(config: PreTrainedConfig) -> Plain:
    """The contents of the config.json that a config was read from; empty if that is not on this machine."""
    name = getattr(config, "_name_or_path", "")
    if not name:
        return {}
    try:
        found = cached_file(
            name,
            "config.json",
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        plain = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) and plain.get("model_type") == config.model_type else {}
