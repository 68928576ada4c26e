"""The classes of models that lack sublayers, built according to the map in the config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...layer_map import MODEL_TYPE, LayerMap, part_config
from ...utils import shown
from ..blocks import find_blocks
from ..custom_models import CustomModel, class_as
from ..remote_code import template
from .output_specs import find_output_specs
from .pass_through import PassThrough


def _depth(plain: dict[str, Any]) -> int:
    layer_map = LayerMap.from_dict(plain.get("trim"))
    if layer_map.has_all_sublayers:
        raise ValueError(
            "Expected config.trim to name the layers that lack a sublayer, as the model_type says, got one of whole layers "
            f"{shown(layer_map.kept_layers)}. The config was changed by hand or is damaged."
        )
    return layer_map.num_layers


def _lacks_some(config: PreTrainedConfig) -> bool:
    return not LayerMap.from_config(config).has_all_sublayers


def remove_missing_sublayers(model: PreTrainedModel) -> None:
    """Replace the sublayers that are dropped according to a model's map with pass-throughs.

    Raises:
        ValueError: If the map is damaged, or the architecture's sublayers cannot be dropped.
    """
    layer_map = LayerMap.from_config(model.config)
    if not layer_map.has_all_sublayers:
        stack = find_blocks(model)
        if any(isinstance(module, PassThrough) for module in stack.blocks.modules()):
            return  # already done by the base model inside, which the Auto classes built
        for position, kind in layer_map.missing_sublayers:
            block = stack.blocks[position]
            for name, spec in find_output_specs(block, stack.config.hidden_size).of(kind).items():
                block.set_submodule(name, PassThrough(spec))


def _refuse_gaps(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that do not exactly match the model's blocks.

    Raises:
        ValueError: Naming them.
    """
    layers = f"{find_blocks(model).name.rpartition('.')[2]}."
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info[what] if layers in str(key))
        if wrong:
            raise ValueError(
                f"Expected weights of exactly the sublayers that config.trim keeps, got {len(wrong)} {what}: "
                f"{wrong[:3]}. The folder is damaged, or its config.json is of another model."
            )


def _code(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    found = {path: module.spec for path, module in model.named_modules() if isinstance(module, PassThrough)}
    lines = [f'    "{path}": ({spec.argument}, {spec.rest}),' for path, spec in found.items()]
    return template(__package__, "pass_through.py.txt"), {"STAND_INS": "\n".join(lines)}


SUBLAYERS = CustomModel(
    model_type=MODEL_TYPE,
    prefix="Trimmed",
    warning="some layers lack their attention or MLP (see trim): run `import trimllm_hf` before loading this model",
    module=__name__,
    depth=_depth,
    applies=_lacks_some,
    build=remove_missing_sublayers,
    check=_refuse_gaps,
    cannot="Sublayers of this architecture cannot be dropped: use unit='block'.",
    summary="some layers lack their attention or their MLP",
    code=_code,
)


def custom_of(layer_map: LayerMap | None) -> CustomModel | None:
    """The custom kind of a model with that map; None (a stock model) if it has all sublayers."""
    return None if layer_map is None or layer_map.has_all_sublayers else SUBLAYERS


def refuse_unloadable(model: PreTrainedModel, values: dict[str, Any], layer_map: LayerMap) -> None:
    """Refuse a drop after which the model could not be built again, since some architectures inspect their blocks.

    The model is built and initialized on the meta device, as when loading.

    Args:
        model: The model to trim.
        values: The fields that change in the config that holds the depth.
        layer_map: The map after the drop.

    Raises:
        ValueError: Naming the error.
    """
    config = copy.deepcopy(model.config)
    for name, value in values.items():
        setattr(part_config(config), name, value)
    config.trim = layer_map.to_dict()
    stock: Any = getattr(type(config), "stock_class", type(config))
    try:
        with torch.device("meta"):
            class_as(type(model), SUBLAYERS)(SUBLAYERS.cast(stock.from_dict(config.to_dict()))).initialize_weights()
    except Exception as error:
        raise ValueError(
            f"Expected {type(model).__name__} to be built without these sublayers, got {type(error).__name__}: {error}. "
            "Drop others, or use unit='block'. Nothing was changed."
        ) from error


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle."""
    return SUBLAYERS.class_named(name)
