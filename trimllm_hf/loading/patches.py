"""The additions that `import trimllm_hf` makes to methods of transformers and PEFT, each when its module is imported.

There is no hook for writing a config, saving an adapter or loading by a concrete class, and an attribute set on one object
would not survive a reload. So the shared methods are wrapped. For models that are not trimmed they behave as before. What
the additions need is imported when they are first used, so that they do not slow down any import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .tokenizer_words import use_older_words


def follow_configs(module: ModuleType) -> None:
    """Write older spellings into a trimmed model's config.json, and refuse to load it at a depth other than its map's."""
    kind = module.PreTrainedConfig
    write, read = kind.to_json_file, kind.from_dict.__func__

    @wraps(write)
    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        write(self, json_file_path, use_diff)
        if getattr(self, "trim", None) is not None:
            from ..surgery.older_spellings import add_to

            add_to(json_file_path, self)
            use_older_words(Path(json_file_path).parent)

    @wraps(read)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if not kwargs or not isinstance(config_dict, dict) or config_dict.get("trim") is None:
            return read(cls, config_dict, **kwargs)
        from .depth_check import refuse_another_depth

        as_written = copy.deepcopy(config_dict)
        found = read(cls, config_dict, **kwargs)
        refuse_another_depth(found[0] if isinstance(found, tuple) else found, lambda: read(cls, as_written))
        return found

    followed: Any = from_dict
    kind.to_json_file, kind.from_dict = to_json_file, classmethod(followed)


def follow_tokenizers(module: ModuleType) -> None:
    """Save a tokenizer beside a trimmed model in terms that transformers 4 knows, whichever of the two is saved first."""
    save: Callable[..., Any] = module.PreTrainedTokenizerBase.save_pretrained

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        found = save(self, save_directory, *args, **kwargs)
        use_older_words(Path(save_directory))
        return found

    module.PreTrainedTokenizerBase.save_pretrained = save_pretrained


def follow_models(kinds: dict[str, str], module: ModuleType) -> None:
    """Save the adapters in a trimmed model with its map; build a custom model where its folder is loaded by a stock class.

    Args:
        kinds: By model type, where the `CustomModel` of its models is: a module, a colon, and its name there.
        module: `transformers.modeling_utils`.
    """
    _follow_adapters(module.PreTrainedModel)
    load = module.PreTrainedModel.from_pretrained.__func__

    @wraps(load)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any = None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        if getattr(cls, "custom", None) is not None:
            return load(cls, name, *args, config=config, **kwargs)
        custom = getattr(type(config), "custom", None)
        if getattr(config, "trim", None) is not None:
            from .depth_check import refuse_another_depth

            refuse_another_depth(config)
        if custom is None:
            try:
                return load(cls, name, *args, config=config, **kwargs)
            except Exception:  # errors for an invalid depth differ between architectures
                custom = _custom_at(kinds, name, kwargs) if config is None else None
                if custom is None:
                    raise
        from ..surgery.custom_models import class_as

        return class_as(cls, custom).from_pretrained(name, *args, config=config, **kwargs)

    followed: Any = from_pretrained
    module.PreTrainedModel.from_pretrained = classmethod(followed)


def follow_peft_models(module: ModuleType) -> None:
    """Save every adapter of a trimmed model with its map."""
    _follow_adapters(module.PeftModel)


def follow_hotswap(module: ModuleType) -> None:
    """Ignore the stop tensor in an adapter's file at the right depth; refuse another depth before anything is swapped."""
    swap: Callable[..., Any] = module.hotswap_adapter
    swap_weights: Callable[..., Any] = module.hotswap_adapter_from_state_dict

    @wraps(swap_weights)
    def hotswap_adapter_from_state_dict(model: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from ..surgery.adapter_files import without_stop

        return swap_weights(model, without_stop(model, state_dict), *args, **kwargs)

    @wraps(swap)
    def hotswap_adapter(model: Any, model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from .depth_check import refuse_adapter_of_other_layers

        refuse_adapter_of_other_layers(model, model_name_or_path)
        return swap(model, model_name_or_path, *args, **kwargs)

    module.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict  # type: ignore[attr-defined]
    module.hotswap_adapter = hotswap_adapter  # type: ignore[attr-defined]


def follow_xlora(module: ModuleType) -> None:
    """Ignore the stop tensor in the files of the adapters that X-LoRA mixes; refuse them on another depth."""
    set_state: Callable[..., Any] = module.set_peft_model_state_dict

    @wraps(set_state)
    def set_peft_model_state_dict(model: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from ..surgery.adapter_files import without_stop

        return set_state(model, without_stop(model, state_dict), *args, **kwargs)

    module.set_peft_model_state_dict = set_peft_model_state_dict  # type: ignore[attr-defined]


def _follow_adapters(kind: Any) -> None:
    save: Callable[..., Any] = kind.save_pretrained

    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(self, "peft_config", None), dict):
            from ..surgery.adapter_files import patch_all

            patch_all(self)
        return save(self, *args, **kwargs)

    kind.save_pretrained = save_pretrained


def _custom_at(kinds: dict[str, str], name: Any, arguments: dict[str, Any]) -> Any:
    """The custom kind of a model in a folder or on the Hub, by its config.json; None for a stock model or no config."""
    from transformers import PreTrainedConfig

    from .base_files import HUB_ARGUMENTS

    try:
        plain, _ = PreTrainedConfig.get_config_dict(
            name, **{key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
        )
    except (OSError, ValueError, TypeError):
        return None
    place = kinds.get(plain.get("model_type", ""))
    if place is None:
        return None
    where, _, attribute = place.partition(":")
    return getattr(import_module(where), attribute)
