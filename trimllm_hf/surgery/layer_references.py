"""Layer numbers in a config outside the description of its blocks: finds them, and renumbers or refuses them.

Some config fields list the blocks whose outputs a head reads, `generation_config` may name an early exit, and skip lists of
quantizers hold module names. They leave no trace in the modules, so verification cannot find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from transformers import PreTrainedConfig

from ..layer_map import part_config
from .blocks import BlockStack
from .forward_reads import fields_that_index_layers
from .layer_names import LayerNames

# Offset by field: a number n in it means the output of block n - offset (0: of block n; 1: hidden state n, where hidden
# state 0 is the embedding).
OFFSETS = {
    "backbone_out_indices": 0,  # DPT
    "intermediate_hidden_state_indices": 0,  # SegGPT
    "merge_index": 0,  # SegGPT
    "out_indices": 1,  # BEiT
    "accept_hidden_layer": 1,  # Qwen 3 Omni's talker, refers to the thinker
}
OFFSETS_BY_TYPE = {("data2vec-vision", "out_indices"): 2}
OF_THE_LAST = {"num_blocks"}  # EoMT: how many of the last blocks process the queries

# Fields that transformers' modelling files index by and that need no handling here: other rules of this package cover them,
# or they refer to a list other than that of the trimmed blocks.
HANDLED_ELSEWHERE = {
    "cross_attention_layers",
    "cross_layer_interval",
    "deepstack_layer_map",
    "deepstack_visual_indexes",
    "layer_types",
    "num_hidden_layers",
    "num_layers",
    "rescale_every",
    "subsample_layers",
}
OF_OTHER_PARTS = {
    "altup_active_idx",
    "conditional_layer",
    "decoder_layers",
    "decoder_num_layers",
    "encode_proj_layers",
    "encoder_in_channels",
    "encoder_projection_indices",
    "extract_layers",
    "feature_layer",
    "fullatt_block_indexes",
    "head_in_index",
    "intermediate_hook_ids",
    "intermediate_layers_indices",
    "neck_ignore_stages",
    "num_summary_tokens",
    "spatial_vision_layer",
    "talker_config",
    "vision_feature_layer",
    "visual_indicator_token_ids",
}


@dataclass(frozen=True)
class Reference:
    """A value that changes with the layer numbers.

    Attributes:
        path: Attributes from the model to the object that holds it, e.g. ("config", "quantization_config").
        field: Its attribute or key there.
        value: Its new value.
    """

    path: tuple[str, ...]
    field: str
    value: Any

    def apply(self, model: Any) -> None:
        """Set it in a model."""
        holder = reduce(getattr, self.path, model)
        if isinstance(holder, dict):
            holder[self.field] = self.value
        else:
            setattr(holder, self.field, self.value)


def find_references(model: Any, stack: BlockStack, kept: Sequence[int]) -> list[Reference]:
    """Find the values outside the description of the blocks that refer to layers by number, renumbered for the kept layers.

    Args:
        model: The model with all layers. Nothing is changed.
        stack: Its blocks.
        kept: Positions of the kept blocks, ascending.

    Raises:
        ValueError: If such a value cannot be renumbered.
    """
    names = LayerNames(model, stack.name, kept)
    indexing = fields_that_index_layers(model)
    found: list[Reference] = []
    for path, config in _configs(model.config, ("config",)):
        for field, value in list(vars(config).items()):
            if field.startswith("_") or field in ("trim", "architectures") or isinstance(value, PreTrainedConfig):
                continue
            if hasattr(value, "to_dict"):  # a quantization config
                held = vars(value).items()
                changed = [(name, names.renumber(each)) for name, each in held]
                found += [Reference((*path, field), name, new) for name, new in changed if new != getattr(value, name)]
            elif (new := names.renumber(value)) != value:
                found.append(Reference(path, field, new))
        holds = config is stack.config or stack.config in [each for _, each in _configs(config, ())]
        for field in sorted(indexing - HANDLED_ELSEWHERE - OF_OTHER_PARTS):
            value = getattr(config, field, None)
            if (holds or field == "accept_hidden_layer") and _are_numbers(value):
                new = _renumbered(field, config.model_type, value, len(stack), kept)
                found += [Reference(path, field, new)] if new != value else []
    generation = getattr(model, "generation_config", None)
    if generation is not None and stack.config is part_config(model.config):
        values = renumber_generation_config(generation, len(stack), kept)
        found += [Reference(("generation_config",), field, value) for field, value in values.items()]
    return found


def renumber_generation_config(generation: Any, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a generation config that name layers, renumbered for the kept layers.

    Args:
        generation: The generation config. It is not changed.
        depth: How many layers there are.
        kept: Positions of the kept layers, ascending.

    Raises:
        ValueError: If no layer before an early exit would be kept.
    """
    values: dict[str, Any] = {}
    leave = getattr(generation, "assistant_early_exit", None)  # LayerSkip: the number of layers that produce the draft
    if leave is not None:
        values["assistant_early_exit"] = sum(position < leave for position in kept)
        if not values["assistant_early_exit"]:
            raise ValueError(
                f"Expected some of the layers before assistant_early_exit={leave} of the generation config to stay, got all "
                "to drop. Drop others, or set it to None. Nothing was changed."
            )
    dola = getattr(generation, "dola_layers", None)
    if isinstance(dola, list) and _are_numbers(dola):
        values["dola_layers"] = sorted({sum(position < state for position in kept) for state in dola})
    return {field: value for field, value in values.items() if value != getattr(generation, field)}


def _configs(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _configs(part, (*path, name))


def _are_numbers(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def _renumbered(field: str, model_type: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """The numbers of a field, renumbered for the kept layers.

    Raises:
        ValueError: If two would be the same, one would refer to no layer, or it is unknown how the field counts.
    """
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    gone = [position for position in range(depth) if position not in kept]
    if field in OF_THE_LAST:
        if any(position >= depth - value for position in gone):
            _refuse(field, value, f"the last {value} layers to stay")
        return value
    offset = OFFSETS_BY_TYPE.get((model_type, field), OFFSETS.get(field))
    if offset is None:
        if all(_is_unaffected(number, depth, gone) for number in numbers):
            return value
        _refuse(field, value, "layers to stay up to those that it numbers, since it is not known how it counts")
    found = []
    for number in numbers:
        block = number - offset if number >= 0 else depth + number
        new = sum(position <= block for position in kept) - 1
        if block >= 0 > new:
            _refuse(field, value, "a layer to stay at or before each that it numbers")
        found.append(number if block < 0 or number == -1 else new + offset if number >= 0 else new - len(kept))
    if len(set(found)) < len(set(numbers)):
        _refuse(field, value, "a layer to stay for each that it numbers")
    return type(value)(found) if isinstance(value, list | tuple) else found[0]


def _is_unaffected(number: int, depth: int, gone: Sequence[int]) -> bool:
    """Whether a number means the same layer, or its output, after a drop, counted either from 0 or from 1."""
    if number < 0:
        return number == -1 or all(position < depth + number for position in gone)
    return all(position > number for position in gone)


def _refuse(field: str, value: Any, expected: str) -> None:
    raise ValueError(
        f"Expected {expected}, got {field}={value} in the config, by which the model reads single layers. Drop other "
        "layers, or change it. Nothing was changed."
    )
