"""Model and config classes for what stock transformers cannot express, derived from any architecture's own on first use.

In memory such a model looks unchanged: the config's `model_type` and the class's name are kept, so that a Trainer, PEFT and
generation treat it in the same way. The classes differ in how they store a config and in what they build from one.

In config.json its `model_type` differs from the base's, and the field for the depth holds a sentence. So stock transformers
reports an unknown model type, and a concrete class (`LlamaForCausalLM.from_pretrained`) reports that the depth is not a
number: neither can fill the gaps with random weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..layer_map import depth_name, part_config
from ..utils import shown
from .older_spellings import file_of, with_older_spellings


@dataclass(frozen=True, eq=False)
class CustomModel:
    """A kind of model with its own classes.

    Attributes:
        model_type: Its `model_type` in config.json.
        prefix: Prefix of the class names.
        warning: The sentence in place of the depth in config.json.
        module: The module through whose attributes pickle finds the classes.
        depth: Returns the depth from the map in an untrusted config.json; raises ValueError if it is damaged.
        applies: Whether a config describes such a model; raises ValueError if its map does not fit it.
        build: Replaces the modules of a model that was built as a stock one.
        check: Raises ValueError based on the missing weights that `from_pretrained` reported.
        cannot: The message for an architecture whose config cannot express it.
        summary: A short description of such a model.
        code: For `write_remote_code`: code with a function `build(model)` and placeholders like <NAME>, and their values,
            from a model on the meta device.
    """

    model_type: str
    prefix: str
    warning: str
    module: str
    depth: Callable[[dict[str, Any]], int]
    applies: Callable[[PreTrainedConfig], bool]
    build: Callable[[PreTrainedModel], None]
    check: Callable[[PreTrainedModel, dict[str, Any]], None]
    cannot: str
    summary: str
    code: Callable[[PreTrainedModel], tuple[str, dict[str, str]]]
    configs: dict[type, type[PreTrainedConfig]] = field(default_factory=dict)
    models: dict[type, type[PreTrainedModel]] = field(default_factory=dict)

    # ---- config.json

    def to_saved_config(self, plain: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
        """The dict for config.json, from a stock config's dict.

        Raises:
            ValueError: If the depth is not a number in the config.
        """
        plain = copy.deepcopy(plain)
        holder: Any = plain
        for name in _path(config, part_config(config)):
            holder = holder[name]
        if depth_name(config) not in vars(part_config(config)):
            raise ValueError(f"Expected {type(config).__name__} to hold its depth as a number, got none. {self.cannot}")
        holder[depth_name(config)] = self.warning
        names = [self.prefix + name.removeprefix(self.prefix) for name in plain.get("architectures") or ()]
        own = {"model_type": self.model_type, "base_model_type": plain["model_type"], "architectures": names or None}
        return {**plain, **own}

    def from_saved_config(self, plain: dict[str, Any]) -> dict[str, Any]:
        """The stock config's dict, from the contents of config.json, which are not trusted.

        Raises:
            ValueError: If it is damaged.
        """
        depth = self.depth(plain)
        base = plain.get("base_model_type")
        if not isinstance(base, str) or base == self.model_type or base not in CONFIG_MAPPING:
            raise ValueError(f"Expected base_model_type to be a model type that transformers knows, got {shown(base)}.")
        found: dict[str, Any] = _replaced_values(plain, self.warning, depth)
        names = found.get("architectures")
        if isinstance(names, list):
            found["architectures"] = [name.removeprefix(self.prefix) for name in names if isinstance(name, str)]
        del found["base_model_type"]
        return {**found, "model_type": base}

    # ---- classes

    def cast(self, found: Any) -> Any:
        """Convert a stock config, or a pair of one and unused arguments, to this kind if its map says so.

        Raises:
            ValueError: If its map is damaged or does not fit it.
        """
        config = found[0] if isinstance(found, tuple) else found
        if self.applies(config):
            config.__class__ = self.config_class(type(config))
        return found

    def config_class(self, stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
        """The class for these models' configs; also registers it with the Auto classes."""
        stock = getattr(stock, "stock_class", stock)
        if stock in self.configs:
            return self.configs[stock]
        fields = {"stock_class": stock, "custom": self, "__module__": self.module}
        made: type[PreTrainedConfig] = type(self.prefix + stock.__name__, (CustomConfigMixin, stock), fields)
        self.configs[stock] = made
        for mapping in [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING")]:
            found = mapping.get(stock, None)
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                mapping.register(made, self.model_class(found), exist_ok=True)
        tokenizers = transformers.TOKENIZER_MAPPING.get(stock, None)
        if tokenizers is not None:
            transformers.TOKENIZER_MAPPING.register(made, tokenizers, exist_ok=True)
        return made

    def model_class(self, stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The class for these models. It keeps the architecture's name, on which transformers relies."""
        assert stock.config_class is not None
        config = self.config_class(stock.config_class)  # this may already create the model class
        if stock not in self.models:
            names = {"__module__": self.module, "__qualname__": self.prefix + stock.__name__}
            fields = {"stock_class": stock, "custom": self, "config_class": config, **names}
            self.models[stock] = type(stock.__name__, (CustomModelMixin, stock), fields)
        return self.models[stock]

    def class_named(self, name: str) -> Any:
        """Look a class up by name, for pickle."""
        found = getattr(transformers, name.removeprefix(self.prefix), None) if name.startswith(self.prefix) else None
        if isinstance(found, type) and issubclass(found, PreTrainedConfig):
            return self.config_class(found)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return self.model_class(found)
        raise AttributeError(f"module {self.module!r} has no attribute {name!r}")


class CustomConfigMixin:
    """Added to an architecture's config class."""

    stock_class: ClassVar[type[PreTrainedConfig]]
    custom: ClassVar[CustomModel]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        config: Any = self
        plain = with_older_spellings(json.loads(config.to_json_string(use_diff=use_diff)), config, file_of(config))
        plain = self.custom.to_saved_config(plain, config)
        Path(json_file_path).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        plain, rest = cls.stock_class.get_config_dict(*args, **kwargs)
        custom = cls.custom
        return (custom.from_saved_config(plain) if plain.get("model_type") == custom.model_type else plain), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return cls.custom.cast(cls.stock_class.from_dict(config_dict, **kwargs))


class CustomModelMixin:
    """Added to an architecture's model class."""

    stock_class: ClassVar[type[PreTrainedModel]]
    custom: ClassVar[CustomModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the architecture's
        self.custom.build(self)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.stock_class.is_custom_code()  # its checkpoints are converted like the architecture's

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        load: Any = super()
        model, info = load.from_pretrained(*args, output_loading_info=True, **kwargs)
        cls.custom.check(model, info)
        return (model, info) if output_loading_info else model


def class_for(model_type: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class for a model of the same architecture with that config."""
    return class_as(model_type, getattr(type(config), "custom", None))


def class_as(model_type: type[PreTrainedModel], custom: CustomModel | None) -> type[PreTrainedModel]:
    """The class for a model of the same architecture of a custom kind, or stock; without wrapper classes."""
    own = _own(model_type)
    stock: type[PreTrainedModel] = getattr(own, "stock_class", own)
    return stock if custom is None else custom.model_class(stock)


def update_classes(model: PreTrainedModel, custom: CustomModel | None) -> None:
    """Change the classes of a model and its config to those that can load it in its present form."""
    config: Any = model.config
    stock: Any = getattr(type(config), "stock_class", type(config))
    config.__class__ = stock if custom is None else custom.config_class(stock)
    own = _own(type(model))
    changed: Any = model
    changed.__class__ = _replaced(type(model), own, class_as(own, custom))


def refuse_sliced(config: PreTrainedConfig) -> None:
    """Refuse to drop layers of a sliced model.

    Raises:
        ValueError: If its layers have individual widths.
    """
    if getattr(config, "slicing", None) is not None:
        raise ValueError(
            "Expected a model that is not sliced, got one whose layers have bases and widths of their own (config.slicing): "
            "without one of them its neighbours would not fit. Drop layers of the base, then slice what is left. Nothing "
            "was changed."
        )


def _own(found: type) -> Any:
    """The class beneath those that a wrapper created."""
    return next(base for base in found.__mro__ if not base.__module__.startswith("torch."))


def _replaced(found: type, old: type, new: type) -> type:
    """A class with one of its bases replaced."""
    if found is old or old is new:
        return new if found is old else found
    bases = tuple(new if base is old else base for base in found.__bases__)
    return type(found.__name__, bases, {k: v for k, v in vars(found).items() if k not in ("__dict__", "__weakref__")})


def _path(config: PreTrainedConfig, holder: PreTrainedConfig) -> list[str]:
    """The attribute names that lead from the model's config to a config."""
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


def _replaced_values(plain: Any, old: str, new: int) -> Any:
    if isinstance(plain, dict):
        return {name: _replaced_values(value, old, new) for name, value in plain.items()}
    return new if plain == old else plain
