"""The units that can be dropped (a block, or the attention or MLP of a block), and running a model without one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layer_map import UNITS
from .sublayers import OutputSpec, find_output_specs
from .trimmable import resolve_model

SEVERAL = (tuple, list)  # how a block returns more than its hidden states; a list in OpenAI GPT


@dataclass(frozen=True)
class Unit:
    """A candidate for a drop.

    Attributes:
        position: Position of its block.
        parts: The modules inside the block that would be dropped; empty for the whole block.
        spec: What each of them would return once it is dropped.
    """

    position: int
    parts: tuple[nn.Module, ...] = ()
    spec: tuple[OutputSpec, ...] = ()


def list_units(model: nn.Module, unit: str, part: str | None = None) -> list[Unit]:
    """The candidates of a model, in the order of their scores: the blocks, or `LayerMap.sublayers`.

    Args:
        model: A transformers model, unwrapped, or one with adapters.
        unit: "block" or "sublayer".
        part: For an encoder-decoder, "decoder" or "encoder"; by default the one that was trimmed, else the decoder.

    Raises:
        ValueError: If there is no unit of that name, or the blocks do not consist of an attention and an MLP.
    """
    if unit not in UNITS:
        raise ValueError(f"Expected unit='block' or 'sublayer', got {unit!r}.")
    target = resolve_model(model, part)
    stack, layer_map = target.stack, target.layer_map
    if unit == "block":
        return [Unit(position) for position in range(len(stack))]
    if stack.part is not None:
        raise ValueError(
            "Expected a model with one list of blocks for unit='sublayer', got an encoder-decoder. Use unit='block'."
        )
    found = []
    for layer, kind in layer_map.sublayers:
        position = layer_map.kept_layers.index(layer)
        spec = find_output_specs(target.skeleton_stack.blocks[position], stack.config.hidden_size).of(kind)
        parts = tuple(stack.blocks[position].get_submodule(name) for name in spec)
        found.append(Unit(position, parts, tuple(spec.values())))
    return found


@contextmanager
def without(unit: Unit, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run a model as if the unit had been dropped.

    A block is still run, so that its output has the right form, but returns its input. An attention or an MLP is not run
    and returns what its pass-through would.
    """
    with ExitStack() as stack:
        for part, spec in zip(unit.parts, unit.spec, strict=True):
            stack.enter_context(_passing_through(part, spec))
        if not unit.parts:
            stack.callback(blocks[unit.position].register_forward_hook(_input, with_kwargs=True).remove)
        yield


@contextmanager
def _passing_through(part: nn.Module, spec: OutputSpec) -> Iterator[None]:
    had = vars(part).get("forward")  # a forward set by a wrapper, if there is one
    part.forward = lambda *args, **kwargs: spec(args, kwargs)
    try:
        yield
    finally:
        if had is not None:
            part.forward = had
        else:
            vars(part).pop("forward", None)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states in the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block.

    Raises:
        ValueError: If they are not all that it returns, and not the first of several values.
    """
    _refuse_other_forms(output)
    hidden: torch.Tensor = output[0] if isinstance(output, SEVERAL) else output
    return hidden


def behind_hidden(output: Any) -> tuple[Any, ...] | None:
    """What a block returns after its hidden states; None if it returns only these, by themselves.

    Raises:
        ValueError: As `block_output`.
    """
    _refuse_other_forms(output)
    return tuple(output[1:]) if isinstance(output, SEVERAL) else None


def _refuse_other_forms(output: Any) -> None:
    if hasattr(output, "_fields") or isinstance(output, Mapping):  # Reformer's two streams, SqueezeBERT's dict
        raise ValueError(
            f"Expected blocks that return their hidden states, alone or first, got a {type(output).__name__} with "
            f"{', '.join(getattr(output, '_fields', output))}. Trim such a model by a score that runs nothing "
            "(importance='last') and without a repair (repair='none')."
        )


def _input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden, rest = block_input(args, kwargs), behind_hidden(output)
    return hidden if rest is None else (hidden, *rest)
