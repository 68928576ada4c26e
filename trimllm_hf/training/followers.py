"""Finds what else holds a model's layers: weight averages, synchronized copies, inference engines.

An object that tracks a model through its parameters does not notice a drop: it would keep the layer, fail in the middle of
an update, or continue with the wrong layer numbers. Such objects are identified by what they hold, and refused before
anything changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

from ..surgery.adapters import base_of
from ..surgery.blocks import BlockStack, find_blocks

# Attributes that a drop updates, or that hold nothing to update.
MENDED = {"model", "model_wrapped", "optimizer", "lr_scheduler", "accelerator", "callback_handler", "teacher"}
PACKAGE = __name__.partition(".")[0]
MOST_DEPTH = 4  # levels of attributes and items that are searched
# A method found only on objects that keep weights elsewhere: TRL's vLLM and SGLang engines, Ray's workers.
_SENDS = re.compile(r"(sync|update|push|send|broadcast)_(\w+_)?(weights|params|parameters)(_\w+)?")


def refuse_followers(trainer: Trainer, model: nn.Module, part: str | None) -> None:
    """Refuse objects other than the Trainer's model and optimizer that hold layers or copies of them.

    Another model that the Trainer holds, such as a frozen reference, may have as many layers; one that a callback holds is
    assumed to follow the model.

    Args:
        trainer: The Trainer.
        model: Its unwrapped model.
        part: The stack of an encoder-decoder.

    Raises:
        ValueError: Naming what holds them.
    """
    stack = find_blocks(base_of(model), part)
    if getattr(trainer.args, "use_vllm", False):
        raise ValueError(
            "Expected a Trainer that generates with the model that it trains (use_vllm=False), got use_vllm=True: the "
            "engine keeps the layers that it was started with, and takes weights by their names. Set use_vllm=False, or "
            "trim the model before (drop_layers) and train it without TrimCallback."
        )
    callbacks = [each for each in trainer.callback_handler.callbacks if not _is_ours(each)]
    holders = [(type(each).__name__, vars(each), True) for each in callbacks]
    holders.append(
        (
            type(trainer).__name__,
            {
                name: value
                for name, value in vars(trainer).items()
                if name not in MENDED and value is not trainer.model_wrapped and not name.endswith("dataset")
            },  # lists of examples are long, and hold no layers
            False,
        )
    )
    for holder, attributes, copies_follow in holders:
        for name, value in attributes.items():
            found = next(_held(value, stack, copies_follow, MOST_DEPTH, set()), None)
            if found is not None:
                raise ValueError(
                    f"Expected nothing but the Trainer's model and optimizer to hold the model's layers, got "
                    f"{holder}.{name}, which holds {found}: it would not follow when layers are dropped. Leave it out (an "
                    "average of weights, a model that is kept in step), or trim the model before it is made: "
                    "drop_layers(model, …), and no TrimCallback. Nothing was changed."
                )


def _is_ours(callback: Any) -> bool:
    return any(base.__module__.partition(".")[0] == PACKAGE for base in type(callback).__mro__)


def _held(value: Any, stack: BlockStack, copies_follow: bool, depth: int, seen: set[int]) -> Iterator[str]:
    """Descriptions of the layers, or copies of them, that a value holds."""
    if id(value) in seen or depth == 0 or isinstance(value, str | int | float | bool | type | None):
        return
    seen.add(id(value))
    blocks = stack.blocks
    if isinstance(value, torch.Tensor):
        if any(value is parameter for parameter in blocks.parameters()):
            yield "a parameter of a layer"
    elif isinstance(value, nn.Module):
        yield from _in_module(value, blocks, copies_follow)
    elif isinstance(value, Mapping):
        tensors = [str(name) for name, each in value.items() if isinstance(each, torch.Tensor)]
        if any(f"{stack.name}." in name for name in tensors):
            yield "tensors by the names of the layers' parameters"
        for each in value.values():
            yield from _held(each, stack, copies_follow, depth - 1, seen)
    elif isinstance(value, list | tuple | set):
        shapes = [each.shape for each in value if isinstance(each, torch.Tensor)]
        inside = [parameter.shape for parameter in blocks.parameters()]
        if len(inside) > 1 and _in_order(inside, shapes):
            yield "a tensor of the shape of each of the layers' parameters"
        for each in value:
            yield from _held(each, stack, copies_follow, depth - 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, Trainer | Accelerator | TrainingArguments):
        sender = next((name for name in dir(type(value)) if _SENDS.fullmatch(name)), None)
        for each in vars(value).values():
            if sender and isinstance(each, nn.Module) and any(module is blocks for module in each.modules()):
                yield f"the model, whose weights {type(value).__name__}.{sender} takes to an engine by their names"
            yield from _held(each, stack, copies_follow or sender is not None, depth - 1, seen)


def _in_module(module: nn.Module, blocks: nn.ModuleList, copies_follow: bool) -> Iterator[str]:
    inside = list(module.modules())
    if any(each is blocks for each in inside):  # the model, its wrapper, or a part that follows the drop
        return
    own = {id(each) for each in blocks.modules()}
    if any(id(each) in own for each in inside):
        yield "a layer"
    elif copies_follow:
        kind, depth = type(blocks[0]), len(blocks)
        if any(isinstance(each, nn.ModuleList) and len(each) == depth and type(each[0]) is kind for each in inside):
            yield "another model with as many layers"


def _in_order(wanted: list[torch.Size], shapes: list[torch.Size]) -> bool:
    """Whether `wanted` is a subsequence of `shapes`."""
    rest = iter(shapes)
    return all(any(shape == each for each in rest) for shape in wanted)
