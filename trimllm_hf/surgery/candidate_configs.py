"""Candidates for a trimmed config: the values of its fields when some layers are removed.

Most configs hold a depth and lists with one entry per layer. Others list layer numbers, count the first or the last
layers, or repeat a pattern. The rules below use the *form* of a value and words in its name, not the model type. If more
than one value is possible, all are tried: verification builds the model that each candidate describes and picks the right
one. If none is right, the config cannot express the removal of these layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import combinations, islice, pairwise, product
from typing import Any

from transformers import PreTrainedConfig

from ..layer_map.depth import LAYERS_BEHIND
from ..utils import is_count

MAX_CANDIDATES = 80  # each costs one build on the meta device

_FIRST = re.compile(r"first_k_dense.*|num_dense_layers|n_dense_layers|max_window_layers|n_input_layers|.*_start(_index)?")
_FIRST_OR_EXCLUSIVE_END = re.compile(r".*layer.*_end")
_INCLUSIVE_END = re.compile(r".*layer.*_end_index")
_LAST = re.compile(r"num_kv_shared_layers|n_output_layers")
_PERIOD = re.compile(r".*(period|interval|_freq|frequency|_step|layer_group_size|pattern)|n_layers_per_.*")
_OFFSET = re.compile(r".*offset")
_OF_LAYERS = re.compile(r".*(layer|moe|attn|attention|expert|mlp|sparse|window|rope|mem_block).*")
_INDICES = re.compile(r".*(layers|layer_id|layers_id|layer_idx|layer_index|attn_idx|layer_indice|layer_indexe).*")


def candidate_configs(
    config: PreTrainedConfig, depth_name: str, kept: Sequence[int], part: str | None = None
) -> Iterator[dict[str, Any]]:
    """Values to set in a config so that it describes only the layers `kept`; the most likely candidate first.

    Args:
        config: The config that holds the depth. It is not changed.
        depth_name: The name of its field for the depth.
        kept: Positions of the kept layers, ascending.
        part: For an encoder-decoder, the part; fields that name the other one are left unchanged.
    """
    other = {"decoder": "encoder", "encoder": "decoder", None: None}[part]
    depth = getattr(config, depth_name)
    # if the depth is the length of a list, the list is enough
    fixed: dict[str, Any] = {depth_name: len(kept)} if depth_name in vars(config) else {}
    choices: dict[str, list[Any]] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name == depth_name or (other is not None and other in name):
            continue
        options = _options(name, value, depth, kept)
        if other is not None and isinstance(value, list | tuple) and options and options[-1] != value:
            options.append(value)  # LED: it may refer to the other part if that is as deep
        if len(options) == 1:
            if options[0] != value:
                fixed[name] = options[0]
        elif options:
            choices[name] = options
    fixed |= _sparse_mlps(config, depth, kept) | _stages(config, depth, kept)
    for name in fixed:
        choices.pop(name, None)
    _put_exception_lists(config, depth, kept, fixed)
    likeliest = fixed | {name: options[0] for name, options in choices.items()}
    yield likeliest
    of_patterns = _patterns(config, depth_name, likeliest, kept)
    if of_patterns:
        yield likeliest | of_patterns
    yield from islice(_others(likeliest, choices), MAX_CANDIDATES)


def names_layers(name: str, value: Any, depth: int) -> bool:
    """Whether a field of a config with that depth may describe layers by position."""
    return name.startswith("num_hidden_layers") or bool(_options(name, value, depth, range(depth)))


def _others(likeliest: dict[str, Any], choices: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations with one other choice, then with two."""
    for many in (1, 2):
        for names in combinations(choices, many):
            for values in product(*(choices[name][1:] for name in names)):
                yield likeliest | dict(zip(names, values, strict=True))


def _options(name: str, value: Any, depth: int, kept: Sequence[int]) -> list[Any]:
    """The values that a field may take, the most likely first; empty for a field that does not describe layers."""
    if isinstance(value, list | tuple) and value:
        return _list_options(name, value, depth, kept)
    if name == "scale_depth" and isinstance(value, int | float):  # MiniCPM: used as scale_depth / sqrt(depth)
        return [value * (len(kept) / depth) ** 0.5]
    if not isinstance(value, int) or isinstance(value, bool):
        return []
    if LAYERS_BEHIND.fullmatch(name):  # for multi-token prediction, after the blocks; transformers does not load them
        return [0, value] if value else []
    below = sum(position < value for position in kept)
    if _FIRST.fullmatch(name) or _FIRST_OR_EXCLUSIVE_END.fullmatch(name):
        return [below]
    if _INCLUSIVE_END.fullmatch(name):
        return [value] if value < 0 else [sum(position <= value for position in kept) - 1]
    if _LAST.fullmatch(name):
        return [sum(position >= depth - value for position in kept)]
    if _PERIOD.fullmatch(name) and _OF_LAYERS.fullmatch(name) and 0 < value:
        return [value, *(other for other in range(1, len(kept) + 1) if other != value)]
    return []


def _list_options(name: str, value: list[Any] | tuple[Any, ...], depth: int, kept: Sequence[int]) -> list[Any]:
    form = type(value)
    cut = form(value[position] for position in kept) if len(value) == depth else None
    if _INDICES.fullmatch(name) and _ascending_indices(value, depth):
        renumbered = form(new for new, old in enumerate(kept) if old in value)
        from_one = form(new + 1 for new, old in enumerate(kept) if old + 1 in value)
        return [renumbered, *([cut] if cut is not None else []), from_one]
    if cut is not None:
        return [cut]
    if _ascending_indices([item - 1 if isinstance(item, int) else item for item in value], depth) and _INDICES.fullmatch(
        name
    ):
        return [form(new + 1 for new, old in enumerate(kept) if old + 1 in value)]
    if all(_are_kinds_and_times(item) for item in value) and sum(len(kinds) * times for kinds, times in value) == depth:
        spread = [kind for kinds, times in value for _ in range(times) for kind in kinds]
        return [[[[spread[position]], 1] for position in kept]]
    if all(isinstance(item, str) for item in value) and len(value) < depth and ("type" in name or "pattern" in name):
        return [form(value[position % len(value)] for position in kept), value]  # repeated to the depth
    return []


def _are_kinds_and_times(item: Any) -> bool:
    """Whether an item has the form of GPT-Neo's attention_types: kinds of layers, and how often they are repeated."""
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], list | tuple) and is_count(item[1])


def _ascending_indices(value: Sequence[Any], depth: int) -> bool:
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < depth for item in value):
        return False
    ascending = all(a < b for a, b in pairwise(value))
    return ascending and (len(value) != depth or max(value) > 1)  # flags, one per layer, are 0 and 1


def _sparse_mlps(config: PreTrainedConfig, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Set `decoder_sparse_step` to 1 and list in `mlp_only_layers` the layers that had no experts because of the step."""
    step, dense = getattr(config, "decoder_sparse_step", None), getattr(config, "mlp_only_layers", None)
    if not isinstance(step, int) or not hasattr(config, "mlp_only_layers") or not isinstance(dense, list | None) or step < 1:
        return {}
    without = [new for new, old in enumerate(kept) if old in (dense or ()) or (old + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": without}


def _stages(config: PreTrainedConfig, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """A vision backbone's stages, which correspond to its blocks: stage n is the output of block n - 1, stage 0 the stem."""
    names, indices = getattr(config, "stage_names", None), getattr(config, "out_indices", None)
    if not isinstance(names, list | tuple) or len(names) != depth + 1 or not isinstance(indices, list | tuple):
        return {}
    states = [index if index >= 0 else depth + 1 + index for index in indices]
    out = [sum(position < state for position in kept) for state in states]
    stages = list(names[: len(kept) + 1])
    return {"stage_names": stages, "_out_indices": out, "_out_features": [stages[state] for state in out]}


def _put_exception_lists(config: PreTrainedConfig, depth: int, kept: Sequence[int], values: dict[str, Any]) -> None:
    """Set values that depend on others: overrides by layer number, and the number of layers between two ends."""
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        overrides = spec.per_layer_overrides
        values["per_layer_config"] = {new: copy.deepcopy(overrides[old]) for new, old in enumerate(kept) if old in overrides}
    first, last = getattr(config, "n_input_layers", None), getattr(config, "n_output_layers", None)
    if isinstance(first, int) and isinstance(last, int) and hasattr(config, "n_recurrent_layers"):
        values["n_recurrent_layers"] = sum(first <= position < depth - last for position in kept)


def _patterns(config: PreTrainedConfig, depth_name: str, likeliest: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Periods and offsets from which the config derives the trimmed lists; {} if there are none."""
    wanted = {
        name: [value[position] for position in kept] for name, value in _derived(config, getattr(config, depth_name)).items()
    }
    fields = {name: value for name, value in vars(config).items() if isinstance(value, int) and not isinstance(value, bool)}
    groups = [
        [
            name,
            *(other for other in fields if _OFFSET.fullmatch(other) and other.startswith(name.removesuffix("period"))),
        ]
        for name in fields
        if _PERIOD.fullmatch(name) and fields[name] > 0
    ]
    found: dict[str, Any] = {}
    for group in groups:
        spans = [range(1, len(kept) + 1), *(range(len(kept)) for _ in group[1:])]
        tries = [{}, *(dict(zip(group, values, strict=True)) for values in product(*spans))]
        best = min(tries, key=lambda values: _mismatches(config, depth_name, likeliest | found | values, wanted))
        found |= best
    return found if found and wanted and not _mismatches(config, depth_name, likeliest | found, wanted) else {}


def _mismatches(config: PreTrainedConfig, depth_name: str, values: dict[str, Any], wanted: dict[str, list[Any]]) -> int:
    changed = copy.copy(config)
    for name, value in values.items():
        if name != "per_layer_config":
            setattr(changed, name, value)
    try:
        got = _derived(changed, getattr(changed, depth_name))
    except (ValueError, ZeroDivisionError, IndexError):
        return len(wanted) + 1
    return sum(list(got.get(name, ())) != value for name, value in wanted.items())


def _derived(config: PreTrainedConfig, depth: int) -> dict[str, Any]:
    """The lists with one entry per layer that a config derives through properties."""
    found = {}
    for base in type(config).__mro__:
        if base is PreTrainedConfig:
            break
        for name, member in vars(base).items():
            if isinstance(member, property):
                value = getattr(config, name, None)
                if isinstance(value, list | tuple) and len(value) == depth:
                    found[name] = value
    return found
