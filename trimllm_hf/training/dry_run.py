"""Which layers may be dropped next, and a dry run of a whole plan.

Most architectures allow any layer to be dropped. Some tie a property to a layer's position (the only attention of a hybrid,
the first block of T5), and some repeat a pattern that their config cannot list: there only a whole period can be dropped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layer_map import LayerMap
from ..surgery.adapters import adapters_of, base_of
from ..surgery.blocks import find_blocks
from ..surgery.drop import plan_drop, refuse_per_layer_tensors
from ..surgery.feasibility import least_important
from ..surgery.from_config import build_from_config
from ..surgery.sublayers import attentions_that_stay
from ..surgery.trimmable import resolve_model
from .config import TrimConfig


def droppable(model: nn.Module, config: TrimConfig) -> list[int]:
    """The positions from which a layer may be chosen: those outside the protected ends.

    For sublayers, also without the attentions from which the cache reads its length.
    """
    base: PreTrainedModel = base_of(model)
    layer_map = LayerMap.from_config(base.config, config.part)
    layers = layer_map.kept_layers
    inside = layers[config.protect_first : len(layers) - config.protect_last]
    if config.unit == "block":
        return [layers.index(layer) for layer in inside]
    stay = attentions_that_stay(find_blocks(base, config.part), layers, range(len(layers)))
    return [
        position
        for position, (layer, kind) in enumerate(layer_map.sublayers)
        if layer in inside and not (kind == "attention" and layer in stay)
    ]


def dry_run(model: nn.Module, config: TrimConfig, to_drop: int) -> dict[int, int]:
    """Drop as many layers as a run has to drop, from a copy on the meta device.

    For sublayers only the first drop is tried, since verification refuses none of the later ones.

    Args:
        model: The model, which is not changed.
        config: The settings.
        to_drop: How many layers to drop.

    Returns:
        For each depth on the way, how many blocks must be dropped at once.

    Raises:
        ValueError: If that many cannot be dropped; with the lowest depth that can be reached.
    """
    candidates = droppable(model, config)
    if to_drop > len(candidates):
        raise ValueError(
            f"Expected a target that leaves at most {len(candidates)} layers to drop (the others are protected, and "
            f"of sublayers the first attention of each type), got {to_drop}. Raise target_layers or target_ratio."
        )
    if to_drop <= 0:
        return {}
    if config.unit != "block":
        plan_drop(model, candidates[:1], config.unit, part=config.part)
        return {}
    base = base_of(model)
    copy: Any = build_from_config(base, {}, config.part, adapters_of(base))
    sizes: dict[int, int] = {}
    depth = len(find_blocks(copy, config.part))
    target, size = depth - to_drop, 1
    while depth > target:
        deepest_first = {position: -float(position) for position in droppable(copy, config)}
        target_model = resolve_model(copy, config.part)
        plan = partial(plan_drop, target_model, portable=config.portable)
        try:
            drop = least_important(plan, deepest_first, depth - target, size)
        except ValueError as error:
            reached = f"It can be trimmed to {depth}; then: " if sizes else ""
            raise ValueError(
                f"Expected a target that {type(base).__name__} can be trimmed to, got {target} layers. {reached}{error}"
            ) from error
        refuse_per_layer_tensors(drop)
        size = sizes[depth] = len(drop.positions)
        drop.apply(of_copy=True)
        depth -= size
    return sizes
