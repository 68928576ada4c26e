"""Checks that rotations leave a model's function unchanged: compares its logits with those of rotated copies of its parts.

The model's own code is run. Blocks are copied, rotated and run one at a time, so that little memory is needed and the model
is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modules import SlicedNorm, norm_eps, shape_block
from .principal import random_basis
from .rotation import ROWS, Gain, rotated_block, rotated_embedding, rotated_reader
from .signals import instead
from .wiring import Block, Wiring

TOLERANCE = 1e-4  # relative to the largest logit, or to 1
TOKENS = 32


def refuse_unequal(model: PreTrainedModel, wiring: Wiring, gains: dict[str, Gain], input_ids: torch.Tensor) -> float:
    """Refuse a model whose function changes when its hidden states are rotated.

    Args:
        model: The stock model.
        wiring: What reads and writes its hidden states.
        gains: Of its norms, by their names in the model.
        input_ids: Tokens of shape (rows, tokens); some of them are used.

    Returns:
        The largest difference of the logits.

    Raises:
        ValueError: If the logits differ by more than rounding.
    """
    tokens = input_ids[:2, :TOKENS]
    own = _logits(model, wiring, tokens, None)
    turned = _logits(model, wiring, tokens, gains)
    difference = (own - turned).abs().max().item()
    allowed = TOLERANCE * max(1.0, own.abs().max().item())
    if not difference <= allowed:  # also true if it is NaN
        raise ValueError(
            f"Expected the logits of {type(model).__name__} to stay the same when its hidden states are rotated, got a "
            f"difference of {difference:.3g} where {allowed:.3g} is allowed: something in this architecture reads or writes "
            "them in another way. It cannot be sliced; what='mlp' may do. Nothing was changed."
        )
    return difference


@torch.no_grad()
def _logits(model: PreTrainedModel, wiring: Wiring, tokens: torch.Tensor, gains: dict[str, Gain] | None) -> torch.Tensor:
    """Logits in float32, of the model or of its rotated parts."""

    @lru_cache(maxsize=2)  # the block's own and the next one's
    def basis(number: int) -> torch.Tensor:
        return random_basis(wiring.width, number).to(tokens.device)

    with ExitStack() as stack:
        for name in wiring.embeddings:
            stack.enter_context(instead(model.get_submodule(name), _table(model.get_submodule(name), gains, basis)))
        for number, block in enumerate(wiring.blocks):
            module = model.get_submodule(block.name)

            def run(*args: Any, number: int = number, module: Any = module, block: Any = block, **kwargs: Any) -> Any:
                if gains is None:
                    copied = copy.deepcopy(module, _kept_configs(module)).float()
                else:
                    copied = _turned(module, block, gains, basis(number), basis(number + 1))
                vars(copied).pop("forward")
                args, kwargs = _float(args), _float(kwargs)
                return nn.Module.__call__(copied, *args, **kwargs)

            stack.enter_context(instead(module, run))
        norm, head = model.get_submodule(wiring.norm), model.get_submodule(wiring.head)
        after = copy.deepcopy(norm).float() if gains is None else SlicedNorm(wiring.width, norm_eps(norm))
        stack.enter_context(instead(norm, after.forward))

        def logits_of(states: torch.Tensor) -> torch.Tensor:
            turn = None if gains is None else (gains[wiring.norm], basis(len(wiring.blocks)))
            return _some_rows_at_a_time(head, states, turn)

        stack.enter_context(instead(head, logits_of))
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        logits: torch.Tensor = output.logits.float()
        return logits


def _turned(module: nn.Module, block: Block, gains: dict[str, Gain], basis: torch.Tensor, after: torch.Tensor) -> nn.Module:
    """A float32 copy of a block that works in other bases. Weights to be rotated are not copied first."""
    own = {norm: gains[f"{block.name}.{norm}"] for norm in block.norms}
    parts = [*block.norms, *(name for half in (block.attention, block.mlp) for name in (*half.readers, half.writer))]
    replaced = {p for name in parts for p in module.get_submodule(name).parameters()}
    shared: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in replaced}
    copied = copy.deepcopy(module, shared | _kept_configs(module)).float()
    shape_block(copied, block, len(basis), len(basis), len(after))
    if any(p.dtype != torch.float32 for p in replaced):  # products are rounded to the weights' own precision
        module = copy.deepcopy(module, _kept_configs(module)).float()
    made = {name: tensor.float() for name, tensor in rotated_block(module, block, own, basis, after)}
    copied.load_state_dict(made, strict=False, assign=True)
    return copied


def _some_rows_at_a_time(head: Any, states: torch.Tensor, turn: tuple[Gain, torch.Tensor] | None) -> torch.Tensor:
    """A head's output in float32, rotated or not; its weight is never held in float32 as a whole."""
    weight = head.weight.T if isinstance(head, Conv1D) else head.weight
    held = getattr(head, "bias", None)
    found = states.new_empty(*states.shape[:-1], len(weight))
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = SimpleNamespace(weight=weight[rows].float(), bias=None if held is None else held[rows])
        made = {"weight": part.weight, "bias": part.bias} if turn is None else dict(rotated_reader(part, *turn))
        bias = made.get("bias")
        found[..., rows] = nn.functional.linear(states, made["weight"].float(), None if bias is None else bias.float())
    return found


def _table(module: Any, gains: dict[str, Gain] | None, basis: Callable[[int], torch.Tensor]) -> Any:
    """An embedding lookup in float32; only the requested rows are converted."""
    look_up = module.forward

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows = look_up(*args, **kwargs)
        if gains is None:
            return rows.float()
        centred = any(gain.centred for gain in gains.values())
        flat = nn.Embedding.from_pretrained(rows.flatten(0, -2).float())
        return rotated_embedding(flat, basis(0), centred).view(rows.shape)

    return run


def _kept_configs(module: nn.Module) -> dict[int, Any]:
    """The configs that a copy shares with the module."""
    return {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}


def _float(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_float(item) for item in value)
    if isinstance(value, dict):
        return {name: _float(item) for name, item in value.items()}
    return value
