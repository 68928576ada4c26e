"""Leave-one-out by sublayers: each attention and each MLP is left out in a forward pass of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters import base_of
from ..guard import rebuild
from ..layer_map import LayerMap
from ..stack import find_stack
from ..sublayers import Gives, find_halves


@dataclass(frozen=True)
class Sublayer:
    """A candidate for a drop.

    Attributes:
        position: Position of its block.
        half: "attention" or "mlp".
        gives: The modules of the block that would go, by their names in it, and what stands for each.
    """

    position: int
    half: str
    gives: dict[str, Gives]


def list_sublayers(model: nn.Module) -> list[Sublayer]:
    """The sublayers that a model has, in the order of `LayerMap.sublayers`: attention, then MLP of each block.

    Raises:
        ValueError: If its blocks are not made of an attention and an MLP.
    """
    base = base_of(model)
    stack, layer_map = find_stack(base), LayerMap.from_config(base.config)
    if stack.part is not None:
        raise ValueError("Expected a model with one stack of layers for unit='sublayer', got an encoder-decoder.")
    blocks = find_stack(rebuild(base, {})).blocks  # without weights, and with all halves
    halves = [find_halves(block, stack.config.hidden_size) for block in blocks]
    positions = {layer: position for position, layer in enumerate(layer_map.kept_layers)}
    return [Sublayer(positions[layer], half, halves[positions[layer]].of(half)) for layer, half in layer_map.sublayers]


@contextmanager
def without(sublayer: Sublayer, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run a model as if a sublayer were not there. It still runs: its parameters are gathered as in any forward pass."""

    def answer(gives: Gives) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = gives.hidden(args, kwargs)
            return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden

        return hook

    with ExitStack() as stack:
        for name, gives in sublayer.gives.items():
            module = blocks[sublayer.position].get_submodule(name)
            stack.callback(module.register_forward_hook(answer(gives), with_kwargs=True).remove)
        yield


def outputs_without(model: nn.Module, batch: Any) -> Iterator[Any]:
    """The model's output on a batch without each of its sublayers."""
    blocks = list(find_stack(model).blocks)
    for sublayer in list_sublayers(model):
        with without(sublayer, blocks):
            yield model(**batch)


def num_units(model: nn.Module, unit: str) -> int:
    """How many scores there are by a unit."""
    return LayerMap.from_config(base_of(model).config).num_units(unit)
