"""Checks that a folder's config, weights and kept-layer map describe the same model, by the headers of its files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..layer_map import LayerMap
from ..loading.checkpoints import unfinished
from ..surgery.custom_models import class_for
from ..utils import json_at
from .contents import Contents

logger = logging.get_logger("transformers.trimllm_hf")

SILENT = 60  # above logging.CRITICAL
SAVE_AGAIN = "Save the model again, into an empty folder."


def check_model(contents: Contents) -> LayerMap:
    """Check that the published files load as exactly the model that their map describes.

    The model is built from the config on the meta device and given the tensors that the files' headers declare, by
    transformers' own loading: no weight is read.

    Returns:
        The map; one that keeps all layers for a model that was not trimmed.

    Raises:
        ValueError: If the files are incomplete, or contradict each other.
    """
    folder = contents.folder
    if re.fullmatch(r"checkpoint-\d+", folder.name) and (reason := unfinished(folder)) is not None:
        raise ValueError(f"Expected a complete checkpoint in {folder}, got one whose save was not finished: {reason}.")
    tensors = read_headers(contents)
    plain = json_at(folder / "config.json")
    if not isinstance(plain, dict) or not plain.get("model_type"):
        raise ValueError(f"Expected a model's config in {folder / 'config.json'}, got no model_type. {SAVE_AGAIN}")
    config, model_class = _class_of(folder, plain)
    try:
        layer_map = LayerMap.from_config(config)
        LayerMap.from_checkpoint(folder)  # raises if trainer_state.json says something else
    except ValueError as error:
        raise ValueError(f"The kept-layer map in {folder} is invalid. {error}") from None
    if model_class is None:
        _check_depth(folder, tensors, layer_map.num_layers)
        return layer_map
    model_class = class_for(model_class, config)  # it may lack sublayers, or be sliced
    with _quiet():
        try:
            told = _loading_info(model_class, config, tensors)
        except Exception as error:  # a config that cannot be built shows it in as many ways as there are architectures
            raise ValueError(
                f"Expected {model_class.__name__} to be built from {folder / 'config.json'}, got {type(error).__name__}: "
                f"{error}. {SAVE_AGAIN}"
            ) from error
    wrong = {
        "that the config asks for and no file holds": told["missing_keys"],
        "that a file holds and the config does not ask for": told["unexpected_keys"],
        "of another shape than the config says": [
            key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]
        ],
    }
    for what, names in wrong.items():
        if names:
            shown = sorted(name if isinstance(name, str) else name[0] for name in names)
            raise ValueError(
                f"Expected the weights in {folder} to fit its config of {layer_map.num_layers} layers, got {len(shown)} "
                f"tensors {what}: {', '.join(shown[:3])}{', …' if len(shown) > 3 else ''}. {SAVE_AGAIN}"
            )
    return layer_map


def _loading_info(model_class: Any, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What transformers reports of a load from these tensors: missing, unexpected and mismatched keys."""
    _, told = model_class.from_pretrained(
        None, config=config, state_dict=dict(tensors), device_map="meta", output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    return told


def read_headers(contents: Contents) -> dict[str, torch.Tensor]:
    """The tensors that the weight files declare, on the meta device.

    Raises:
        ValueError: If a file is cut short, or the index and the files disagree.
    """
    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, str] = {}
    for name in contents.weights:
        path = contents.folder / name
        try:
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():
                    part = opened.get_slice(key)
                    dtype = str_to_torch_dtype[part.get_dtype()]
                    tensors[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                    held[key] = name
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"Expected whole safetensors weights in {path}, got: {error}. {SAVE_AGAIN}") from None
    if SAFE_WEIGHTS_INDEX_NAME in contents.sizes:
        plain: Any = json_at(contents.folder / SAFE_WEIGHTS_INDEX_NAME)
        if plain["weight_map"] != held:
            differ = sorted(dict(plain["weight_map"].items() ^ held.items()))
            raise ValueError(
                f"Expected {SAFE_WEIGHTS_INDEX_NAME} to name the shards' tensors, got {len(differ)} in other places: "
                f"{', '.join(differ[:3])}. The shards are of two saves. {SAVE_AGAIN}"
            )
    return tensors


def _class_of(folder: Path, plain: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel] | None]:
    """The config and the class that stock transformers would load by; None where that would run the folder's own code."""
    # a config of ours names its base's type, and the code beside it is only for those who have not this package
    own_code = "auto_map" in plain and "base_model_type" not in plain
    if own_code or "quantization_config" in plain:
        reason = "it has its own code, which is not run here" if own_code else "it is quantized"
        logger.warning(f"Of the weights in {folder}, only the number of layers is checked: {reason}.")
        return PreTrainedConfig.from_dict(plain), None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected a config that transformers reads in {folder}, got: {error}. {SAVE_AGAIN}") from error
    names = config.architectures or []
    for name in names:
        model_class = getattr(transformers, name, None) or _registered(name, config)
        if model_class is not None:
            return config, model_class
    raise ValueError(
        f"Expected {folder / 'config.json'} to name a class of transformers in architectures, got {names}. {SAVE_AGAIN}"
    )


def _registered(name: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """A model class that a package has registered with an Auto class for this kind of config."""
    for auto in (getattr(transformers, auto) for auto in dir(transformers) if auto.startswith("AutoModel")):
        found = auto._model_mapping.get(type(config), None) if hasattr(auto, "_model_mapping") else None
        for model_class in found if isinstance(found, tuple) else (found,):
            if getattr(model_class, "__name__", None) == name:
                return model_class
    return None


def _check_depth(folder: Path, tensors: Sequence[str] | dict[str, torch.Tensor], depth: int) -> None:
    """Refuse weights in which no list of modules is numbered from 0 to depth - 1."""
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        for match in re.finditer(r"(?:^|\.)(\d+)\.", name):
            numbers.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    if set(range(depth)) not in numbers.values():
        longest = max((len(found) for found in numbers.values()), default=0)
        raise ValueError(
            f"Expected the weights in {folder} to hold the config's {depth} layers, got none numbered 0 to {depth - 1} (the "
            f"longest list has {longest}). {SAVE_AGAIN}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' report on the keys, which the error repeats, and its progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(SILENT)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
