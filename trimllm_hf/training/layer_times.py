"""The time that each layer of a run's model takes, by its name in the base's numbering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..engines import ProcessGroup
from ..latency.layer_times import measure_layers
from ..latency.proxy_model import proxy_model
from ..layer_map import LayerMap
from ..surgery.adapters import base_of
from ..utils import isolated_rng
from .config import TrimConfig


def ms_of_layers(
    model: PreTrainedModel,
    config: TrimConfig,
    process_group: ProcessGroup,
    args: TrainingArguments,
    measure: Callable[..., list[float]] = measure_layers,
) -> dict[str, float]:
    """The ms that each layer takes, by its name in the base's numbering; empty if no score uses them.

    Measured on the main process, on a model of the same shapes, so that it means the same under every engine.

    Args:
        model: The unwrapped model; only its config is used.
        config: The settings, including the batch size and prompt length for measurements.
        process_group: The processes of the run.
        args: Determine the device and the dtype.
        measure: The function that measures.

    Raises:
        ValueError: If it cannot be measured with these settings.
        torch.OutOfMemoryError: If that model does not fit on the device.
    """
    if not config.importance_per_ms:
        return {}
    names = layer_names(model, config)
    found = [0.0] * len(names)
    try:
        if process_group.rank == 0:
            with isolated_rng(0):
                found = measure(
                    proxy_model(model, config.part, args),
                    config.unit,
                    part=config.part,
                    batch_size=config.latency_batch_size,
                    prompt_tokens=config.latency_prompt_tokens,
                )
    except Exception as error:  # the other processes wait for the result
        process_group.raise_on_all(error)
        raise
    agreed = process_group.all_reduce(torch.tensor(found, dtype=torch.float64))
    return dict(zip(names, agreed.tolist(), strict=True))


def names_of(model: nn.Module, config: TrimConfig) -> tuple[Any, ...]:
    """The model's layers in the base's numbering, in the order of their scores: blocks, or sublayers."""
    layer_map = LayerMap.from_config(base_of(model).config, config.part)
    return layer_map.kept_layers if config.unit == "block" else layer_map.sublayers


def layer_names(model: nn.Module, config: TrimConfig) -> list[str]:
    """The same as strings: "3", or "attention 3"."""
    names = names_of(model, config)
    return [str(name) if config.unit == "block" else f"{name[1]} {name[0]}" for name in names]
