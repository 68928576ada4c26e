"""`drop_layers`: removes layers from a model and their traces from its config, or refuses before anything changes.

A drop is first planned on copies: each candidate for the trimmed config (`candidate_configs.py`) is verified (`verify.py`)
before the model is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layer_map import SUBLAYER_KINDS, LayerMap, part_config
from .adapter_files import patch_adapter_save
from .adapters import candidate_adapter_configs, renumber_statistics
from .blocks import BlockStack
from .candidate_configs import candidate_configs
from .custom_models import refuse_sliced, update_classes
from .layer_names import LayerNames
from .layer_pattern import correct_periods, refuse_unportable
from .layer_references import Reference, find_references
from .per_layer_tensors import cut
from .position_constraints import check_position_constraints
from .sublayers import (
    SUBLAYERS,
    OutputSpec,
    PassThrough,
    custom_of,
    find_output_specs,
    keep_attentions,
    refuse_unloadable,
)
from .sublayers.attentions import keeps_keys_and_values
from .trimmable import TrimmableModel, resolve_model
from .unshare_config import unshare_config
from .verify import Renumbering, verify_drop


@dataclass(frozen=True)
class PlannedDrop:
    """A drop that has been verified. `apply` cannot fail partway: it only deletes and assigns.

    Attributes:
        target: The model as it was when the drop was planned.
        layer_map: The map after the drop.
        positions: Positions of the blocks that are removed.
        config_values: The fields of the config that change, with their new values.
        renumbering: Module attributes and configs that change with the layer numbers.
        pass_throughs: What each dropped sublayer returns after the drop, by its name in the model.
        adapters: The configs of the adapters after the drop, by name.
        references: Other values that name layers by number, in configs and the generation config.
    """

    target: TrimmableModel
    layer_map: LayerMap
    positions: frozenset[int]
    config_values: dict[str, Any]
    renumbering: Renumbering
    pass_throughs: dict[str, OutputSpec]
    adapters: dict[str, Any]
    references: Sequence[Reference] = ()

    @property
    def model(self) -> PreTrainedModel:
        """The unwrapped model, without PEFT's wrapper."""
        return self.target.model

    def dropped(self, unit: str) -> list[int]:
        """Positions of the dropped layers, blocks or sublayers, in the model as it was when the drop was planned."""
        before, after = self.target.layer_map, self.layer_map
        if unit == "block":
            return sorted(self.positions)
        return [position for position, each in enumerate(before.sublayers) if each not in set(after.sublayers)]

    @property
    def removed_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the dropped modules hold."""
        blocks = enumerate(self.target.stack.blocks)
        kept_blocks = {module for i, block in blocks if i not in self.positions for module in block.modules()}
        dropped = [self.target.stack.blocks[position] for position in sorted(self.positions)]
        inside = {module for block in dropped for module in block.modules()} - kept_blocks  # blocks may share modules
        dropped += (halves := [self.model.get_submodule(name) for name in self.pass_throughs])
        inside |= {module for half in halves for module in half.modules()}
        staying = {
            id(parameter)
            for module in self.model.modules()
            if module not in inside
            for parameter in module.parameters(recurse=False)
        }
        return list({id(p): p for module in dropped for p in module.parameters() if id(p) not in staying}.values())

    def apply(self, of_copy: bool = False) -> LayerMap:
        """Drop the layers, in place. The model and its container of blocks remain the same objects.

        So do its configs, unless another model shares one of them; then this model gets copies.

        Args:
            of_copy: Whether the model is a copy with its own configs. Otherwise all live objects are searched for models
                that share them.
        """
        stack, adapters = self.target.stack, self.target.adapters
        kept = [position for position in range(len(stack)) if position not in self.positions]
        renumber_statistics(self.target.outer, LayerNames(self.model, stack.name, kept))
        for (name, key), dimension in self.renumbering.per_layer.items():
            parameter = self.model.get_submodule(name).get_parameter(key)
            parameter.data = cut(parameter.data, dimension, len(stack), kept)
            parameter.grad = None  # it has another shape
        if not of_copy:
            unshare_config(self.model)
        config = part_config(self.model.config, stack.part)
        for name, spec in self.pass_throughs.items():
            self.model.set_submodule(name, PassThrough(spec))
        for position in sorted(self.positions, reverse=True):
            del stack.blocks[position]
        modules = dict(self.model.named_modules())
        changed = [modules[name].config for name, _ in self.renumbering.configs if name in modules]  # some hold copies
        for each in {id(held): held for held in [config, *changed]}.values():
            if type(each) is type(config):
                _set_values(each, self.config_values)
        for (name, field), (before, after) in self.renumbering.configs.items():
            if name in modules and getattr(modules[name].config, field, None) == before:
                setattr(modules[name].config, field, after)
        for (name, attribute), (before, after) in self.renumbering.attributes.items():
            now = getattr(modules.get(name), attribute, None)  # a dropped sublayer has no number
            if (list(now) if isinstance(now, tuple) else now) == before:  # a value changed by the user is kept
                setattr(modules[name], attribute, after)
        for reference in self.references:
            reference.apply(self.model)
        if self.positions:
            correct_periods(config)
        self.model.config.trim = self.layer_map.to_dict()
        for name, adapter in adapters.items():
            vars(adapter).update(vars(self.adapters[name]))
        patch_adapter_save(self.model, stack.name, self.layer_map)
        update_classes(self.model, custom_of(self.layer_map))
        return self.layer_map


def plan_drop(
    model: nn.Module | TrimmableModel,
    layers: Sequence[int],
    unit: str = "block",
    step: int | None = None,
    importance: str | None = None,
    scores: Sequence[float] | None = None,
    part: str | None = None,
    portable: bool = False,
) -> PlannedDrop:
    """Verify a drop without changing anything; see `drop_layers`.

    Args:
        model: The model; or, for several plans of one model, what `resolve_model` found in it.
        layers: As for `drop_layers`.
        unit: As for `drop_layers`.
        step: Optimizer step of the drop, for the map's history.
        importance: Name of the score that chose the layers, for the history.
        scores: Their scores, in the order of `layers`, for the history.
        part: As for `drop_layers`; no effect if `model` is already resolved.
        portable: Whether the kinds of the layers must follow the architecture's own pattern afterwards.

    Raises:
        ValueError: As `drop_layers`.
    """
    target = model if isinstance(model, TrimmableModel) else resolve_model(model, part)
    base, stack, before = target.model, target.stack, target.layer_map
    refuse_sliced(base.config)
    after = before.drop(layers, step=step, importance=importance, scores=scores, unit=unit)
    kept = [position for position, layer in enumerate(before.kept_layers) if layer in set(after.kept_layers)]
    gone = frozenset(range(len(stack))) - set(kept)
    _keep_an_attention(stack, kept)
    check_position_constraints(base, stack, kept, after.has_all_sublayers)
    pass_throughs = {} if after.has_all_sublayers else _pass_throughs(target, after)
    full, inner_name = target.skeleton, target.skeleton_stack.name
    references = find_references(base, stack, kept) if gone else []
    refusal: ValueError | None = None
    for values in candidate_configs(stack.config, stack.depth_name, kept, stack.part) if gone else [{}]:
        for configs in candidate_adapter_configs(target.adapters, full, inner_name, kept):
            try:
                renumbering = verify_drop(target, kept, values, configs) if gone else Renumbering({}, {})
            except ValueError as error:
                refusal = refusal or error  # of the most likely candidate
                continue
            if not after.has_all_sublayers:
                refuse_unloadable(base, values, after)
            if portable:
                refuse_unportable(stack.config, values, kept)
            return PlannedDrop(target, after, gone, values, renumbering, pass_throughs, configs, references)
    assert refusal is not None
    raise refusal


def refuse_per_layer_tensors(drop: PlannedDrop) -> None:
    """Refuse a drop that an optimizer could not follow.

    Raises:
        ValueError: If it cuts parameters outside the layers.
    """
    if drop.renumbering.per_layer:
        names = [".".join(key) for key in drop.renumbering.per_layer]
        raise ValueError(
            f"Expected a model whose other parameters keep their shape while it trains, got {type(drop.model).__name__}, "
            f"whose tensors {names} hold a slice for each layer. Drop its layers before training, by drop_layers. Nothing "
            "was changed."
        )


def drop_layers(model: nn.Module, layers: Sequence[int], unit: str = "block", part: str | None = None) -> LayerMap:
    """Drop layers of an unwrapped model, in place.

    Args:
        model: A transformers model, or one with adapters (PeftModel), that no engine has wrapped; for one that is, use
            `drop_prepared_layers`.
        layers: Positions in the model as it is now, from 0.
        unit: "block", a whole layer; or "sublayer", an attention or an MLP with its residual. Then `layers` are positions
            in the model's sublayers: attention and MLP of the first block, of the second, and so on, without those already
            dropped (`LayerMap.sublayers`). A block is removed when both its sublayers are dropped.
        part: For an encoder-decoder (T5, BART), the part to drop from: "decoder" or "encoder". By default the one that
            was trimmed before, else the decoder.

    Returns:
        The kept-layer map, in the numbering of the base model. It is also stored in `model.config.trim`.

    Raises:
        ValueError: If a layer is out of range, repeated, or all are named; if the architecture has no single list of
            blocks, or its blocks do not consist of an attention and an MLP; if its other part was trimmed before; or if the
            trimmed config would describe a model other than the trimmed one. The model is left unchanged.
    """
    return plan_drop(model, layers, unit, part=part).apply()


def _pass_throughs(target: TrimmableModel, after: LayerMap) -> dict[str, OutputSpec]:
    """The pass-throughs for the sublayers that are dropped while their block is kept."""
    model, stack, before = target.model, target.stack, target.layer_map
    if stack.part is not None:
        raise ValueError(
            f"Expected a model with one list of blocks for unit='sublayer', got the encoder-decoder "
            f"{type(model).__name__}. Use unit='block'. Nothing was changed."
        )
    SUBLAYERS.to_saved_config(model.config.to_dict(), model.config)  # raises if the config has no field for it
    keep_attentions(stack, after, [before.kept_layers.index(layer) for layer in after.kept_layers])
    blocks = target.skeleton_stack.blocks
    lost = set(before.sublayers) - set(after.sublayers)
    found: dict[str, OutputSpec] = {}
    for position, layer in enumerate(before.kept_layers):
        for kind in SUBLAYER_KINDS:
            if layer in after.kept_layers and (layer, kind) in lost:
                sublayers = find_output_specs(blocks[position], stack.config.hidden_size)
                found |= {f"{stack.name}.{position}.{name}": spec for name, spec in sublayers.of(kind).items()}
    return found


def _keep_an_attention(stack: BlockStack, kept: Sequence[int]) -> None:
    """Require an attention layer in a hybrid model, which needs one to read the length of its cache when generating."""
    types = getattr(stack.config, "layer_types", None)
    if not isinstance(types, list | tuple) or len(types) != len(stack):
        return
    with_cache = [position for position in range(len(stack)) if keeps_keys_and_values(types[position])]
    if with_cache and not set(with_cache) & set(kept):
        raise ValueError(
            f"Expected at least one of the attention layers {with_cache} to stay, got all of them to drop. The model could "
            "not generate with a cache without one. Nothing was changed."
        )


def _set_values(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)
