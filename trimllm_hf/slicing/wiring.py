"""Which modules read and write a model's hidden states, without a table of architectures.

A skeleton on the meta device is run, and the objects passed to each module are recorded: a module that gets the very output
of a norm reads it, and the last matrix of an attention or an MLP writes. The comparison of logits shows whether that is
complete.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..surgery.blocks import find_blocks, find_sublayers

MATRICES = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Half:
    """An attention or an MLP, by the names of its modules in the block.

    Attributes:
        norm: The norm whose result it reads.
        readers: The matrices that read it.
        writer: The matrix whose result is added to the hidden states.
        last: The module that returns that result: the writer, or the dropout after it.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    last: str


@dataclass(frozen=True)
class Block:
    """A block's two halves.

    Attributes:
        name: The block's own name in the model.
        attention: The first half.
        mlp: The second.
        parallel: Whether both read the block's input.
    """

    name: str
    attention: Half
    mlp: Half
    parallel: bool

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms; both halves may share one."""
        return tuple(dict.fromkeys((self.attention.norm, self.mlp.norm)))


@dataclass(frozen=True)
class Wiring:
    """What reads and writes a model's hidden states, by name.

    Attributes:
        width: The hidden size.
        embeddings: The tables whose rows are summed to form the first block's input.
        blocks: The blocks.
        norm: The final norm.
        head: The matrix that produces the logits.
    """

    width: int
    embeddings: tuple[str, ...]
    blocks: tuple[Block, ...]
    norm: str
    head: str


def find_wiring(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Wiring:
    """Find what reads and writes the hidden states of a model of that class and config.

    Args:
        model_class: The architecture's own class.
        config: Its config.

    Raises:
        ValueError: If the model does not consist of pre-norm blocks with an attention and an MLP, or cannot be traced.
    """
    config = copy.deepcopy(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"), torch.no_grad():
            config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
            skeleton = model_class(config).eval()
            trace = _Trace(skeleton)
            skeleton(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=True)
    except (_NotUnderstood, ValueError):
        raise
    except Exception as error:  # failures differ between architectures
        raise _refusal(model_class, f"one that does not run without memory ({type(error).__name__}: {error})") from error
    finally:
        logging.set_verbosity(verbosity)
    try:
        return trace.wiring()
    except _NotUnderstood as error:
        raise _refusal(model_class, str(error)) from None


class _NotUnderstood(Exception):
    """Why a model's wiring cannot be sliced."""


def _refusal(model_class: type, got: str) -> ValueError:
    return ValueError(
        f"Expected {model_class.__name__} to be made of blocks, each an attention and an MLP that read the hidden states "
        f"behind a norm and add to them, got {got}. This architecture cannot be sliced; what='mlp' may do. Nothing was "
        "changed."
    )


@dataclass(eq=False)
class _Call:
    name: str
    module: nn.Module
    inputs: list[Any]
    output: Any


class _Trace:
    """The calls of a skeleton's modules, in order; the tensors are kept alive, so that each remains a distinct object."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.calls = model, list[_Call]()
        self.stack = find_blocks(model)
        self.width: int = self.stack.config.hidden_size
        self.entries: dict[str, Any] = {}  # the input of each block
        blocks = {f"{self.stack.name}.{number}" for number in range(len(self.stack))}
        for name, module in model.named_modules():
            if name in blocks:
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True)
            elif not any(True for _ in module.children()):
                module.register_forward_hook(self._calling(name), with_kwargs=True)

    def _entering(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.entries[name] = args[0] if args else kwargs.get("hidden_states")

        return hook

    def _calling(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.calls.append(_Call(name, module, inputs, output))

        return hook

    def wiring(self) -> Wiring:
        first = self.stack.name
        blocks = tuple(self._block(number) for number in range(len(self.stack)))
        outside = [call for call in self.calls if not call.name.startswith(f"{first}.")]
        head = self.model.get_output_embeddings()
        heads = [call.name for call in outside if call.module is head]
        if not isinstance(head, MATRICES) or heads != [
            name for name, module in self.model.named_modules() if module is head
        ]:
            raise _NotUnderstood("one without a head that makes logits")
        inside = [number for number, call in enumerate(self.calls) if call not in outside]
        before = [call for call in self.calls[: inside[0]] if _holds(call.module)]
        behind = [call for call in self.calls[inside[-1] :] if call in outside and _is_used(call.module, head)]
        if not before or not all(isinstance(c.module, nn.Embedding) and _width(c) == self.width for c in before):
            raise _NotUnderstood(f"{_named(before)} in front of the blocks, where only tables of embeddings may be")
        if len(behind) != 1 or not _is_norm(behind[0].module, self.width):
            raise _NotUnderstood(f"{_named(behind)} behind the blocks, where one norm has to be")
        seen = {id(call.module) for call in self.calls}
        unused = [
            name for name, module in self.model.named_modules() if _own(module) and id(module) not in seen and _leaf(module)
        ]
        if unused:
            raise _NotUnderstood(f"one with {unused[:3]}, which did not take part")
        return Wiring(self.width, tuple(dict.fromkeys(call.name for call in before)), blocks, behind[0].name, heads[0])

    def _block(self, number: int) -> Block:
        name = f"{self.stack.name}.{number}"
        try:
            halves = find_sublayers(self.stack.blocks[number])
        except ValueError as error:
            raise _NotUnderstood(str(error)) from None
        calls = [call for call in self.calls if call.name.startswith(f"{name}.")]
        found = {}
        for half, modules in (("attention", halves.attention), ("mlp", halves.mlp)):
            inside = tuple(f"{name}.{module}" for module in modules)
            found[half] = self._half(name, calls, [c for c in calls if _within(c.name, inside)])
        used = {half.norm for half in found.values()}
        norms = {f"{name}.{norm}" for norm in used}
        insides = tuple(f"{name}.{module}" for module in (*halves.attention, *halves.mlp))
        others = [c for c in calls if _holds(c.module) and c.name not in norms and not _within(c.name, insides)]
        if others:
            raise _NotUnderstood(f"{_named(others)} in a block beside its halves and their norms")
        entries = [c.inputs[0] is self.entries[name] for c in calls if c.name in norms]
        if not entries[0]:
            raise _NotUnderstood(f"a block whose {calls[0].name} does not read the block's input")
        return Block(name, found["attention"], found["mlp"], parallel=all(entries))

    def _half(self, block: str, calls: list[_Call], inside: list[_Call]) -> Half:
        norms = {id(c.output): c.name for c in calls if c not in inside and _is_norm(c.module, self.width)}
        readers = [
            (c.name, norms[id(t)]) for c in inside if isinstance(c.module, MATRICES) for t in c.inputs if id(t) in norms
        ]
        writers = [c for c in inside if isinstance(c.module, MATRICES)]
        if not readers or len({norm for _, norm in readers}) != 1 or not writers or _width(writers[-1]) != self.width:
            raise _NotUnderstood("a half in which no matrices read a norm's result, or none writes")
        writer = last = writers[-1]
        for call in calls[calls.index(writer) + 1 :]:
            if isinstance(call.module, nn.Dropout) and any(t is last.output for t in call.inputs):
                last = call
        short = len(block) + 1
        names = tuple(dict.fromkeys(name[short:] for name, _ in readers))
        return Half(readers[0][1][short:], names, writer.name[short:], last.name[short:])


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _width(call: _Call) -> int:
    return int(call.output.shape[-1]) if isinstance(call.output, torch.Tensor) else 0


def _own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_used(module: nn.Module, head: nn.Module) -> bool:
    return (_holds(module) or "norm" in type(module).__name__.lower()) and module is not head


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module has only vectors of that width."""
    parameters = list(module.parameters())
    named = "norm" in type(module).__name__.lower()
    return named and all(tuple(parameter.shape) == (width,) for parameter in parameters)


def _named(calls: list[_Call]) -> str:
    return f"the modules {[f'{c.name} ({type(c.module).__name__})' for c in calls][:3]}" if calls else "nothing"
