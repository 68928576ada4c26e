"""How long each layer takes, for an importance per millisecond."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark.utils.timer import timer  # waits for the accelerator before it reads the clock
from transformers import PreTrainedModel, TrainingArguments

from ..adapters import base_of
from ..calibration import own_randomness
from ..config import TrimConfig
from ..engines.agreement import Together
from ..importance.units import Unit, list_units
from ..latency.measure import measure_latency
from ..latency.twin import twin_of
from ..layer_map import LayerMap
from ..stack import find_stack
from ..sublayers import Gives, layer_types

NEW_TOKENS, REPEATS, WARM_UP = 16, 5, 1  # of the measurement

Calls = dict[nn.Module, list[tuple[int, float]]]  # of each module: how much it was given, and the ms that it took


def measure_layers(
    model: PreTrainedModel, unit: str, *, part: str | None = None, batch_size: int = 1, prompt_tokens: int = 128
) -> list[float]:
    """The ms that each layer takes where it stands, in the order of its scores: for a token that the model generates.

    Of a model that does not generate, for a forward pass. Layers that are built alike get one figure, their median: with
    whole blocks of one kind all are the same.

    Args:
        model: The model, on its device, unwrapped. It stays as it is.
        unit: "block" or "sublayer".
        part: Of an encoder-decoder, whose layers to measure.
        batch_size: Sequences at a time.
        prompt_tokens: Tokens before the generated ones.
    """
    stack = find_stack(base_of(model), part)
    units = list_units(model, unit) if unit == "sublayer" else [Unit(position) for position in range(len(stack))]
    modules = [unit.parts or (stack.blocks[unit.position],) for unit in units]
    types = layer_types(stack)
    kinds = [(types[unit.position], *map(_built, parts)) for unit, parts in zip(units, modules, strict=True)]
    with _timed([part for parts in modules for part in parts]) as calls:
        measure_latency(
            model,
            batch_sizes=[batch_size],
            prompt_tokens=prompt_tokens,
            new_tokens=NEW_TOKENS,
            repeats=REPEATS,
            warmup=WARM_UP,
        )
    of_kind: dict[Any, list[float]] = defaultdict(list)
    for kind, parts in zip(kinds, modules, strict=True):
        of_kind[kind].append(sum(_typical(calls[part]) for part in parts))
    return [median(of_kind[kind]) for kind in kinds]


def ms_of_layers(
    model: PreTrainedModel,
    config: TrimConfig,
    together: Together,
    args: TrainingArguments,
    measure: Callable[..., list[float]] = measure_layers,
) -> dict[str, float]:
    """The ms that each layer takes, by its name in the base's numbering; nothing, where no score goes by it.

    Measured on the main process, on a model of the same shapes: so it means the same under every engine.

    Args:
        model: The unwrapped model; only its config is looked at.
        config: The settings; also at which batch size and prompt length to measure.
        together: The processes of the run.
        args: Say the device, and the dtype.
        measure: What measures.

    Raises:
        ValueError: If it cannot be measured with these settings.
        torch.OutOfMemoryError: If there is no room for that model on the device.
    """
    if not config.importance_per_ms:
        return {}
    names = layer_names(model, config)
    found = [0.0] * len(names)
    try:
        if together.rank == 0:
            with own_randomness(0):
                found = measure(
                    twin_of(model, config.part, args),
                    config.unit,
                    part=config.part,
                    batch_size=config.latency_batch_size,
                    prompt_tokens=config.latency_prompt_tokens,
                )
    except Exception as error:  # the other processes wait for the figures
        together.fail(error)
        raise
    agreed = together.agree(torch.tensor(found, dtype=torch.float64))
    return dict(zip(names, agreed.tolist(), strict=True))


def names_of(model: nn.Module, config: TrimConfig) -> tuple[Any, ...]:
    """The model's layers in the base's numbering, in the order of their scores: blocks, or sublayers."""
    layer_map = LayerMap.from_config(base_of(model).config, config.part)
    return layer_map.kept_layers if config.unit == "block" else layer_map.sublayers


def layer_names(model: nn.Module, config: TrimConfig) -> list[str]:
    """The same as texts: "3", or "attention 3"."""
    names = names_of(model, config)
    return [str(name) if config.unit == "block" else f"{name[1]} {name[0]}" for name in names]


def _built(module: nn.Module) -> tuple[str, int]:
    """What two modules have in common that take the same time."""
    return repr(module), sum(parameter.numel() for parameter in module.parameters())


def _typical(calls: list[tuple[int, float]]) -> float:
    """The median ms of the smallest calls: those for one token, where there are such."""
    if not calls:  # its block reads its weights without calling it
        return 0.0
    least = min(size for size, _ in calls)
    return median(ms for size, ms in calls if size == least)


@contextmanager
def _timed(modules: list[nn.Module]) -> Iterator[Calls]:
    """Note how long each call of these modules takes."""
    calls: Calls = defaultdict(list)
    started: dict[nn.Module, float] = {}

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        started[module] = timer()

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].append((Gives(argument=0).hidden(args, kwargs).numel(), (timer() - started[module]) * 1e3))

    handles = [module.register_forward_pre_hook(start, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(end, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
