"""Finds in the source what `forward` reads: attributes of a module, and config fields that index layers or hidden states.

Verification compares modules as built by `__init__`. What only `forward` reads is invisible to it.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_BUILT = ("__init__", "__post_init__", "_init_weights", "reset_parameters")
_PER_LAYER = re.compile(r".*(hidden_states?|states|layers?|blocks?|encodings|features?|feature_maps|activations|outputs?)")
_OF_A_CACHE = re.compile(r"cache|past|(?<!hidden_)states?\b|(?<!hidden_)state_|_kv|logger|warn|print")
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LIBRARIES = ("torch.", "peft.", "accelerate.", "bitsandbytes.")


def fields_that_index_layers(model: nn.Module) -> frozenset[str]:
    """The config fields by which the modelling files of a model index layers or hidden states, outside `__init__`."""
    files = {type(module).__module__ for module in model.modules()}
    return frozenset().union(*(_of_module(name) for name in files if not f"{name}.".startswith(_LIBRARIES)))


@cache
def _of_module(name: str) -> frozenset[str]:
    try:
        return fields_in_source(inspect.getsource(sys.modules[name]))
    except (OSError, TypeError, KeyError):  # no source: __main__ of an interactive session
        return frozenset()


def fields_in_source(source: str) -> frozenset[str]:
    """The same for a file's source."""
    found: set[str] = set()
    for each in ast.walk(ast.parse(source)):
        if isinstance(each, ast.ClassDef):
            aliases = {
                node.targets[0].attr: field
                for node in ast.walk(each)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
                if (field := _field(node.value, {})) is not None
            }
            for function in each.body:
                if isinstance(function, ast.FunctionDef) and function.name not in _BUILT:
                    found |= set(_of_function(function, aliases))
    return frozenset(found)


def _of_function(function: ast.FunctionDef, aliases: dict[str, str]) -> Iterator[str]:
    known = dict(aliases)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if (field := _field(node.value, aliases)) is not None:
                known[node.targets[0].id] = field
    counters: set[str] = set()
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension)]
    for loop in loops:
        targets = {name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
        if isinstance(loop.iter, ast.Call) and _last_word(loop.iter.func) == "range":
            continue
        if field := next(_fields(loop.iter, known), None):
            known |= dict.fromkeys(targets, field)
        elif _names_layers(loop.iter):
            counters |= targets
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice | ast.Tuple):
            if _PER_LAYER.fullmatch(_last_word(node.value)):
                yield from _fields(node.slice, known)
        elif isinstance(node, ast.Compare) and {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & counters:
            yield from _fields(node, known)


def _names_layers(node: ast.AST) -> bool:
    words = {
        n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if isinstance(n, ast.Attribute | ast.Name)
    }
    return any(_PER_LAYER.fullmatch(word) for word in words)


def _last_word(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _field(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """The field that an expression reads: `config.F`, `self.config.F`, or a name that is bound to one."""
    if isinstance(node, ast.Attribute):
        if "config" in _last_word(node.value):
            return node.attr
        return aliases.get(node.attr) if _last_word(node.value) == "self" else None
    return aliases.get(node.id) if isinstance(node, ast.Name) else None


def _fields(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    for each in ast.walk(node):
        if (field := _field(each, aliases)) is not None:
            yield field


def forward_reads(module: nn.Module, attribute: str) -> bool:
    """Whether a module's forward, or a method that it calls, may read an attribute.

    What only `__init__` reads has already become a weight or a buffer, which a drop does not change.
    """
    return any(
        isinstance(node, ast.Attribute) and node.attr == attribute
        for method in _forward_methods(type(module))  # type: ignore[arg-type]  # a class is hashable
        for node in ast.walk(method)
    )


def forward_computes_with(module: nn.Module, attribute: str, old: int, new: int) -> bool:
    """Whether a module's forward may compute something different when an attribute that numbers a layer changes.

    Indexing a cache with it, or a comparison whose result stays the same, does not count.
    """
    stock = type(module).__module__.startswith("transformers.")
    for method in _forward_methods(type(module)):  # type: ignore[arg-type]  # a class is hashable
        parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        names = {attribute}
        looped = {
            name.id: ast.unparse(loop.iter)
            for loop in ast.walk(method)
            if isinstance(loop, ast.For | ast.comprehension)
            for name in ast.walk(loop.target)
            if isinstance(name, ast.Name)
        }
        for node in _running(method, module):
            if not (isinstance(node, ast.Attribute | ast.Name) and _last_word(node) in names):
                continue
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                continue
            use = _use(node, parents)
            if isinstance(use, ast.Assign) and isinstance(use.targets[0], ast.Name):
                names.add(use.targets[0].id)  # tracked in the code that follows
            elif isinstance(use, ast.Compare) and _compares_alike(use, node, old, new):
                continue
            elif not _is_harmless(use, stock, looped):
                return True
    return False


def _running(node: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """The nodes of a method in source order, without branches that a false flag of the module disables."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and child in node.body and _is_off(node.test, module):
            continue
        yield from _running(child, module)


def _is_off(test: ast.AST, module: nn.Module) -> bool:
    return isinstance(test, ast.Attribute) and _last_word(test.value) == "self" and getattr(module, test.attr, None) is False


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    """The nearest expression around a node in which its value is used for something."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.Call | ast.Subscript | ast.Compare | ast.Assign | ast.JoinedStr | ast.stmt):
            return node
    return node


def _is_harmless(use: ast.AST, stock: bool, looped: dict[str, str]) -> bool:
    if isinstance(use, ast.Call):  # transformers' own modules are known to use it for a cache
        return bool(_OF_A_CACHE.search(ast.unparse(use.func))) or (stock and ast.unparse(use.func).startswith("self."))
    if isinstance(use, ast.Subscript):
        text = ast.unparse(use.value)
        return bool(_OF_A_CACHE.search(looped.get(text, text)))
    if isinstance(use, ast.Compare):
        return bool(_OF_A_CACHE.search(ast.unparse(use)))
    return isinstance(use, ast.JoinedStr)


def _compares_alike(use: ast.Compare, node: ast.AST, old: int, new: int) -> bool:
    """Whether a comparison with a constant has the same result for the old number and the new."""
    others = [each for each in (use.left, *use.comparators) if each is not node]
    if not all(isinstance(each, ast.Constant) for each in others) or not all(type(each) in _COMPARE for each in use.ops):
        return False
    results = set()
    for number in (old, new):
        left, *rest = [number if each is node else ast.literal_eval(each) for each in (use.left, *use.comparators)]
        truth = True
        for compared, right in zip(use.ops, rest, strict=True):
            truth = truth and bool(_COMPARE[type(compared)](left, right))
            left = right
        results.add(truth)
    return len(results) == 1


@cache  # reading a class's source takes 50 ms, and a plan needs it for each numbered module of each block
def _forward_methods(kind: type) -> list[ast.FunctionDef]:
    """`forward` and the methods of a class that it calls, directly or through others."""
    methods: dict[str, ast.FunctionDef] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("torch.nn") or base is object:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        methods.update({node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)})
    to_read, found = ["forward"], {}
    while to_read:
        name = to_read.pop()
        if name in methods and name not in found:
            found[name] = methods[name]
            to_read += [node.attr for node in ast.walk(methods[name]) if isinstance(node, ast.Attribute)]
    return list(found.values())
