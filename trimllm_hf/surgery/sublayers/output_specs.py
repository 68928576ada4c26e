"""Finds what replaces a block's attention or MLP when it is dropped, and verifies it by running the block's own code.

Dropping a sublayer with its residual means that the hidden states pass through unchanged. How depends on the block. In a
pre-norm block the attention's output is replaced by zeros. In one like Gemma's or OLMo 2's, the norm between the
attention and the residual sum is dropped as well; in a post-norm block like BERT's, the norm after the sum. There is no
table of architectures. The block's *skeleton* (its norms, sums and scales, without attention and MLP) is run on random
numbers, with small functions in place of the sublayers, to verify that:

- with both sublayers dropped it returns its input;
- it computes one sublayer after the other, or the sum of both (parallel blocks), so that each sublayer alone is what
  remains when the other is dropped.

A block for which this does not hold is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from ...engines import full_shape
from ..blocks import find_sublayers
from .block_skeleton import Probe, block_skeleton, depends, numbers, same, within
from .pass_through import OutputSpec, PassThrough

Paths = Mapping[str, OutputSpec]
ROWS, TOKENS = 3, 2  # of the random hidden states; not 2 rows, which could be confused with a tuple of two
MAX_WIDTH = 1_000_000
MAX_TRIES = 1000


@dataclass(frozen=True)
class OutputSpecs:
    """The replacements for modules of a block, by their names in it, when its attention or its MLP is dropped."""

    attention: dict[str, OutputSpec]
    mlp: dict[str, OutputSpec]

    def of(self, kind: str) -> dict[str, OutputSpec]:
        """The pass-throughs for "attention" or "mlp"."""
        return self.attention if kind == "attention" else self.mlp


def find_output_specs(block: nn.Module, width: int) -> OutputSpecs:
    """Find the replacements for the modules of a block when one of its sublayers is dropped.

    Args:
        block: A block with both sublayers. The values of its parameters are not read, so it may be on the meta device.
        width: Size of the hidden states.

    Raises:
        ValueError: If the block does not consist of an attention and an MLP that can be dropped alone.
    """
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"Expected hidden states of at most {MAX_WIDTH} numbers, got {width}.")
    sublayers = find_sublayers(block)
    skeleton = _Skeleton(block, width, tuple(sublayers.attention), tuple(sublayers.mlp))
    try:
        with torch.device("cpu"), torch.enable_grad():
            return skeleton.specs()
    except Exception as error:  # errors of blocks that cannot be run on their own differ
        raise ValueError(
            f"Expected {type(block).__name__} to be an attention and an MLP, each with a residual of its own, got one "
            f"{_why(error)}. Use unit='block' for this architecture. Nothing was changed."
        ) from error


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, _NotSeparable) else f"that fails: {type(error).__name__}: {error}"


class _NotSeparable(Exception):
    """Why a sublayer of a block cannot be dropped."""


@dataclass
class _Run:
    """One run of a skeleton: its output and input, and the input of each norm."""

    output: torch.Tensor
    input: torch.Tensor
    weights: dict[str, list[nn.Parameter]]  # of each sublayer's probes
    fed: dict[str, torch.Tensor | None]  # the input of each sublayer's first module
    norms: dict[str, list[nn.Parameter]]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # inputs of the norms that were called

    def reached(self) -> set[str]:
        """The norms on which the output depends."""
        return {name for name, parameters in self.norms.items() if depends(self.output, parameters)}


class _Skeleton:
    """A block without its attention and MLP."""

    def __init__(self, block: nn.Module, width: int, attention: tuple[str, ...], mlp: tuple[str, ...]) -> None:
        self.block, self.width = block, width
        self.names = {"attention": attention, "mlp": mlp}
        inside = (*attention, *mlp)
        self.norms = [
            name
            for name, module in block.named_modules()
            if name and any(True for _ in module.parameters(recurse=False)) and not within(name, inside)
        ]
        called = inspect.signature(block.forward).parameters.values()
        self.needed = {
            parameter.name: None
            for parameter in list(called)[1:]
            if parameter.default is parameter.empty and parameter.kind in (0, 1, 3)  # named, without a default
        }
        self.found: dict[str, OutputSpec] = {}  # for each sublayer's modules

    def specs(self) -> OutputSpecs:
        """The pass-throughs for each sublayer, verified."""
        self.found = self._find_specs()
        base = self.run()
        detached = self.run(detached=True)
        order = self._order(detached)
        closing: dict[str, list[str]] = {"attention": [], "mlp": [], "both": []}
        for norm in detached.reached():
            closing[self._owner(detached, norm, order)].append(norm)
        found: dict[str, dict[str, OutputSpec]] = {}
        for kind, names in self.names.items():
            pass_throughs = {name: self.found[name] for name in names} | dict.fromkeys(closing[kind], OutputSpec(argument=0))
            dead = base.reached() - self.run(pass_throughs).reached()
            found[kind] = pass_throughs | dict.fromkeys(self._whole(dead, base), OutputSpec(argument=0))
        if closing["both"]:
            raise _NotSeparable(f"with {closing['both']} around the sum of both")
        self._verify(found["attention"], found["mlp"], order)
        return OutputSpecs(found["attention"], found["mlp"])

    def _find_specs(self) -> dict[str, OutputSpec]:
        """The form of each sublayer's output for which the block, without any norm, returns its input."""
        names = [*self.names["attention"], *self.names["mlp"]]
        norms = dict.fromkeys((name for name in self.norms if self._is_norm(name)), OutputSpec(argument=0))
        why, ran = "", False
        for passed in ({}, norms):  # type: dict[str, OutputSpec]
            for tried in _answers(len(names))[:MAX_TRIES]:
                answers = dict(zip(names, tried, strict=True))
                if any(spec.argument == 0 and not self._adds_its_input(name) for name, spec in answers.items()):
                    continue
                try:
                    run = self.run({**passed, **answers})
                    if same(run.output, run.input) and self._keeps_rows_apart(answers):
                        return answers
                    why, ran = "that changes the hidden states when both are gone", True
                except Exception as failure:  # errors from a wrong form of output differ between blocks
                    why = why if ran else f"that does not run without them ({type(failure).__name__}: {failure})"
        raise _NotSeparable(why)

    def _adds_its_input(self, name: str) -> bool:
        """Whether a module may be a sublayer that includes its residual; as in BERT, the norm is then inside as well."""
        return any("norm" in type(module).__name__.lower() for module in self.block.get_submodule(name).modules())

    def _whole(self, dead: set[str], run: _Run) -> list[str]:
        """The same norms, with some replaced by the part of the block that consists of them."""
        tops = {name.partition(".")[0] for name in dead} & run.inputs.keys()
        whole = {top for top in tops if {name for name in self.norms if f"{name}.".startswith(f"{top}.")} <= dead}
        return sorted(whole | {name for name in dead if name.partition(".")[0] not in whole})

    def _keeps_rows_apart(self, answers: Paths) -> bool:
        """Whether rows do not affect one another: `attention(…)[0]` of a plain tensor would give the first row to all."""
        self.found = dict(answers)
        run = self.run()
        (seen,) = torch.autograd.grad(run.output[1].sum(), [run.input])
        return not seen[0].any() and not seen[2].any()

    def _is_norm(self, name: str) -> bool:
        return all(len(full_shape(p)) <= 1 for p in self.block.get_submodule(name).parameters(recurse=False))

    def _order(self, run: _Run) -> tuple[str, ...]:
        """The sublayers in the order in which one feeds the other; () if neither does."""
        for first, second in (("attention", "mlp"), ("mlp", "attention")):
            fed = run.fed[second]
            if fed is not None and depends(fed, run.weights[first]):
                return first, second
        return ()

    def _owner(self, run: _Run, norm: str, order: tuple[str, ...]) -> str:
        """The sublayer to which a norm belongs, among the norms that the hidden states pass without any sublayer.

        Either each norm follows a sublayer, as in BERT, or each precedes one, as in MiniMax; then one precedes both.
        """
        behind = {name: self._behind(run, name) for name in run.reached()}
        if not order:
            return behind[norm][0] if len(behind[norm]) == 1 else "both"
        if all(behind.values()):
            return order[len(behind[norm]) - 1] if len(behind[norm]) > 1 else behind[norm][0]
        if len(behind[norm]) > 1:
            return "both"
        return order[1] if behind[norm] else order[0]

    def _behind(self, run: _Run, norm: str) -> list[str]:
        got = run.inputs.get(norm)
        return [kind for kind in self.names if got is not None and depends(got, run.weights[kind])]

    def _verify(self, attention: Paths, mlp: Paths, order: tuple[str, ...]) -> None:
        none = self.run({**attention, **mlp})
        if not same(none.output, none.input):
            raise _NotSeparable("that changes the hidden states when both are gone")
        whole, only = self.run(), {"attention": self.run(mlp), "mlp": self.run(attention)}
        if order:
            rest = mlp if order[1] == "attention" else attention
            both = self.run(rest, hidden=only[order[0]].output.detach()).output
        else:
            both = sum((run.output - run.input for run in only.values()), whole.input)
        if not same(whole.output, both):
            raise _NotSeparable("that is neither one after the other nor the sum of both")

    def run(self, pass_throughs: Paths | None = None, detached: bool = False, hidden: torch.Tensor | None = None) -> _Run:
        """Run the skeleton, with pass-throughs for the modules named and probes for the rest of the sublayers."""
        inside: dict[str, nn.Module] = {name: PassThrough(spec) for name, spec in (pass_throughs or {}).items()}
        probes = {
            kind: {name: Probe(self.found[name], phase, detached) for name in names if name not in inside}
            for (kind, names), phase in zip(self.names.items(), (0.3, 0.7), strict=True)
        }
        for made in probes.values():
            inside.update(made)
        skeleton = block_skeleton(self.block, inside)
        if hidden is None:
            hidden = numbers("", torch.Size((ROWS, TOKENS, self.width)))
        hidden = hidden.clone().requires_grad_()
        norms = {name: skeleton.get_submodule(name) for name in self.norms if not within(name, inside)}
        inputs: dict[str, torch.Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                inputs.setdefault(name, OutputSpec(argument=0).hidden(args, kwargs))

            return hook

        for name in {*norms, *(name.partition(".")[0] for name in norms)}:
            skeleton.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        output = skeleton.forward(hidden, **self.needed)
        output = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
            raise _NotSeparable("that does not return hidden states")
        return _Run(
            output,
            hidden,
            {kind: [probe.weight for probe in made.values()] for kind, made in probes.items() if made},
            {kind: next(iter(made.values())).input for kind, made in probes.items() if made},
            {name: list(module.parameters(recurse=False)) for name, module in norms.items()},
            inputs,
        )


def _answers(number: int) -> list[tuple[OutputSpec, ...]]:
    """Forms of output for a number of modules, the most likely first: zeros, as a plain tensor."""
    forms = product(product((None, 0, 1), (None, 1, 2)), repeat=number)
    found = [tuple(OutputSpec(argument, rest) for argument, rest in form) for form in forms]
    return sorted(found, key=lambda form: [sum(g.argument is not None for g in form), sum(g.rest is not None for g in form)])
