"""How long each layer takes, for an importance per millisecond."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn
from torch.utils.benchmark.utils.timer import timer  # waits for the accelerator before it reads the clock
from transformers import PreTrainedModel

from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.sublayers import OutputSpec, layer_types
from ..surgery.units import list_units
from .measure import measure_latency

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
    stack = find_blocks(base_of(model), part)
    units = list_units(model, unit, part)
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
        calls[module].append((OutputSpec(argument=0).hidden(args, kwargs).numel(), (timer() - started[module]) * 1e3))

    handles = [module.register_forward_pre_hook(start, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(end, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
