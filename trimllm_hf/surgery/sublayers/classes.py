"""Model and config classes for models that lack sublayers, derived from an architecture's own when first needed.

In memory the config's `model_type` and the class's name are unchanged, so that a Trainer, PEFT and generation treat the
model as before. The classes differ in how they save a config and in what they build from one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ...layer_map import MODEL_TYPE, LayerMap, part_config
from ..blocks import find_blocks
from ..older_spellings import file_of, with_older_spellings
from .output_specs import find_output_specs
from .pass_through import PassThrough
from .saved_config import PREFIX, from_saved_config, to_saved_config

_CONFIGS: dict[type, type[PreTrainedConfig]] = {}
_MODELS: dict[type, type[PreTrainedModel]] = {}


class TrimmedConfig:
    """Mixin for an architecture's config class."""

    stock_class: ClassVar[type[PreTrainedConfig]]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        config: Any = self
        plain = with_older_spellings(json.loads(config.to_json_string(use_diff=use_diff)), config, file_of(config))
        plain = to_saved_config(plain, config)
        Path(json_file_path).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        plain, rest = cls.stock_class.get_config_dict(*args, **kwargs)
        return (from_saved_config(plain) if plain.get("model_type") == MODEL_TYPE else plain), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return with_trimmed_class(cls.stock_class.from_dict(config_dict, **kwargs))


class TrimmedModel:
    """Mixin for an architecture's model class."""

    stock_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the architecture's
        remove_missing_sublayers(self)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.stock_class.is_custom_code()  # its checkpoints are converted as the architecture's are

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        load: Any = super()
        model, info = load.from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_gaps(model, info)
        return (model, info) if output_loading_info else model


def with_trimmed_class(found: Any) -> Any:
    """Give a stock config, or the first of a tuple, the class for models that lack sublayers if its map says so.

    Raises:
        ValueError: If its map is damaged or does not fit it.
    """
    config = found[0] if isinstance(found, tuple) else found
    if not LayerMap.from_config(config).has_all_sublayers:
        config.__class__ = config_class(type(config))
    return found


def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class for models that lack sublayers; it is registered with the Auto classes."""
    stock = getattr(stock, "stock_class", stock)
    if stock in _CONFIGS:
        return _CONFIGS[stock]
    name = PREFIX + stock.__name__
    made: type[PreTrainedConfig] = type(name, (TrimmedConfig, stock), {"stock_class": stock, "__module__": __name__})
    _CONFIGS[stock] = made
    for mapping in [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING")]:
        found = mapping.get(stock, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            mapping.register(made, model_class(found, made), exist_ok=True)
    tokenizers = transformers.TOKENIZER_MAPPING.get(stock, None)
    if tokenizers is not None:
        transformers.TOKENIZER_MAPPING.register(made, tokenizers, exist_ok=True)
    return made


def model_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The model class for models that lack sublayers. It keeps the architecture's name, which transformers looks up."""
    if stock in _MODELS:
        return _MODELS[stock]
    fields = {"stock_class": stock, "config_class": config, "__module__": __name__, "__qualname__": PREFIX + stock.__name__}
    made: type[PreTrainedModel] = type(stock.__name__, (TrimmedModel, stock), fields)
    _MODELS[stock] = made
    return made


def class_of(model_type: type[PreTrainedModel], has_all_sublayers: bool) -> type[PreTrainedModel]:
    """The class of a model of the same architecture that has all sublayers, or lacks some, without a wrapper's subclass."""
    own = _own(model_type)
    stock: type[PreTrainedModel] = getattr(own, "stock_class", own)
    config = stock.config_class
    assert config is not None
    return stock if has_all_sublayers else model_class(stock, config_class(config))


def update_classes(model: PreTrainedModel, has_all_sublayers: bool) -> None:
    """Set the classes of a model and its config to those that can load the model as it is now."""
    config: Any = model.config
    stock: Any = getattr(type(config), "stock_class", type(config))
    config.__class__ = stock if has_all_sublayers else config_class(stock)
    own = _own(type(model))
    changed: Any = model
    changed.__class__ = _replaced(type(model), own, class_of(own, has_all_sublayers))


def _own(found: type) -> Any:
    """The class below those that wrappers (`torch.…`) derive."""
    return next(base for base in found.__mro__ if not base.__module__.startswith("torch."))


def _replaced(found: type, old: type, new: type) -> type:
    """A class with one of its bases replaced."""
    if found is old or old is new:
        return new if found is old else found
    bases = tuple(new if base is old else base for base in found.__bases__)
    return type(found.__name__, bases, {k: v for k, v in vars(found).items() if k not in ("__dict__", "__weakref__")})


def refuse_unloadable(model: PreTrainedModel, values: dict[str, Any], layer_map: LayerMap) -> None:
    """Refuse a drop after which the model could not be built again: some architectures inspect their blocks.

    It is built and initialized on the meta device, as a load does.

    Args:
        model: The model to trim.
        values: What changes in the config that holds the depth.
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
            class_of(type(model), has_all_sublayers=False)(
                with_trimmed_class(stock.from_dict(config.to_dict()))
            ).initialize_weights()
    except Exception as error:
        raise ValueError(
            f"Expected {type(model).__name__} to be built without these sublayers, got {type(error).__name__}: {error}. "
            "Drop others, or use unit='block'. Nothing was changed."
        ) from error


def remove_missing_sublayers(model: PreTrainedModel) -> None:
    """Replace the sublayers that a model's map says are dropped by pass-throughs.

    Raises:
        ValueError: If the map is damaged, or the architecture's sublayers cannot be dropped.
    """
    layer_map = LayerMap.from_config(model.config)
    if not layer_map.has_all_sublayers:
        stack = find_blocks(model)
        for position, kind in layer_map.missing_sublayers:
            block = stack.blocks[position]
            for name, spec in find_output_specs(block, stack.config.hidden_size).of(kind).items():
                block.set_submodule(name, PassThrough(spec))


def _refuse_gaps(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that are not exactly those of the model's blocks.

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


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle."""
    found = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(found, type) and issubclass(found, PreTrainedConfig):
        return config_class(found)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return class_of(found, has_all_sublayers=False)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
