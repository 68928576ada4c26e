"""MLP channels: cuts each block's MLP according to its redundancy and refits the remaining channels in closed form.

A channel is one dimension of an MLP's intermediate state: a row of its input matrix (in a gated MLP, of both the gate and
the up projection) and a column of its output matrix. Where all widths are the same, the result is a stock model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..layer_map import LayerMap, part_config
from ..surgery.custom_models import update_classes
from ..surgery.unshare_config import unshare_config
from ..utils import evaluating
from .allocation import allocate, redundancy_of, refuse_narrow
from .channel_shapes import Channels, find_channels, keep
from .classes import SLICED
from .memory import release_freed_memory
from .modules import assign
from .preconditions import on_device, real_tokens, refuse_model
from .principal import Covariance
from .signals import Calls, at, observe
from .slice_map import SliceMap

RIDGE = 0.01  # relative to the mean of the diagonal
TOLERANCE = 1e-4


def slice_channels(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    ratio: float,
    allocation: str,
    spread: float,
    multiple: int,
    progress: bool,
) -> SliceMap:
    """Cut channels of a model's MLPs, in place; see `slice_model`.

    Raises:
        ValueError: As `slice_model`.
    """
    stock = refuse_model(model)
    found = find_channels(stock)
    width = found[0].width
    if any(channels.width != width for channels in found):
        raise ValueError("Expected MLPs of one width, got several. Nothing was changed.")
    tokens = real_tokens(batches, stock.config.get_text_config().hidden_size)
    one_width = round((1 - ratio) * width / multiple) * multiple
    if allocation == "uniform":
        refuse_narrow([one_width] * len(found), width)
    field = width_name(stock, found, one_width) if allocation == "uniform" else None
    if allocation == "uniform" and field is None:
        raise ValueError(
            f"Expected a config that says how many channels an MLP has, got {type(stock.config).__name__} without. Use "
            "allocation='redundancy'. Nothing was changed."
        )
    batches = on_device(batches, next(stock.parameters()).device)
    rounds = len(found) * len(batches)
    with torch.no_grad(), evaluating([stock]), tqdm(total=3 * rounds, desc="Slicing", disable=not progress) as bar:
        calls, influence = observe(stock, batches, bar.update)
        if allocation == "uniform":
            widths = [one_width] * len(found)
        else:
            widths = allocate(redundancy_of(influence), width, ratio, spread, multiple)
        refuse_unordered(stock, found, calls[0])
        chosen = [
            _next(stock.get_submodule(channels.block), number, channels, calls, kept, bar.update)
            for number, (channels, kept) in enumerate(zip(found, widths, strict=True))
        ]
    for channels, (kept, weight) in zip(found, chosen, strict=True):
        _cut(stock.get_submodule(channels.block), channels, kept, weight)
    base = LayerMap.from_config(stock.config)
    slice_map = SliceMap(
        width,
        tuple(widths),
        what="mlp",
        ratio=ratio,
        allocation=allocation,
        spread=spread if allocation == "redundancy" else 0.0,
        redundancy=tuple(influence),
        tokens=tokens,
        base_model=base.base_model,
        base_revision=base.base_revision,
    )
    unshare_config(stock)
    if field is not None:
        setattr(part_config(stock.config), field, widths[0])
    else:
        stock.config.slicing = slice_map.to_dict()
        update_classes(stock, SLICED)
    return slice_map


def _next(module: nn.Module, number: int, channels: Channels, calls: list[Calls], width: int, done: Any) -> tuple[Any, Any]:
    """The channels of a block to keep, once all earlier blocks are cut; also moves the calls on to the next block."""
    kept, weight = choose(module, channels, *gather(calls, number, module, channels, done), width)
    shared = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    cut = copy.deepcopy(module, shared)
    _cut(cut, channels, kept, weight)
    for call in calls:
        call.states = call.run(number, cut)
        done()
    release_freed_memory()
    return kept, weight.to(next(module.parameters()).dtype)


def _cut(module: nn.Module, channels: Channels, kept: torch.Tensor, weight: torch.Tensor) -> None:
    keep(module, channels, kept)
    assign(module, f"{channels.writer}.weight", weight)


def width_name(model: PreTrainedModel, found: Sequence[Channels], width: int) -> str | None:
    """The config field that gives each MLP that many channels and changes nothing else; None if there is none.

    Each field that holds the current number of channels, or None (GPT-2's `n_inner`), is tried on a skeleton.
    """
    now = found[0].width
    holder = part_config(model.config)
    fields = [name for name, value in vars(holder).items() if (type(value) is int and value == now) or value is None]
    for field in sorted(fields, key=lambda name: vars(holder)[name] is None):
        skeleton = built_with(model, field, width)
        if skeleton is None:
            continue
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for channels in found:
            for reader, runs in channels.readers:
                for kind in ("weight", "bias"):
                    _scale(expected, f"{channels.block}.{reader}.{kind}", now * runs, width * runs)
            _scale(expected, f"{channels.block}.{channels.writer}.weight", now, width)
        if {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()} == expected:
            return field
    return None


def _scale(shapes: dict[str, tuple[int, ...]], name: str, old: int, new: int) -> None:
    """Write a new size into a shape; the other checks cover the ambiguity of a square matrix."""
    if name in shapes:
        sizes = list(shapes[name])
        sizes[sizes.index(old)] = new
        shapes[name] = tuple(sizes)


def built_with(model: PreTrainedModel, field: str, value: int) -> nn.Module | None:
    """A model of the same class on the meta device, with another value in its config; None if it cannot be built."""
    config = copy.deepcopy(model.config)
    setattr(part_config(config), field, value)
    try:
        with torch.device("meta"):
            return type(model)(config)
    except Exception:  # a field with another meaning may fail with any exception
        return None


@torch.no_grad()
def refuse_unordered(model: PreTrainedModel, found: Sequence[Channels], calls: Calls) -> None:
    """Refuse an MLP whose channels are not independent: permuting them must not change the output of any block.

    Raises:
        ValueError: If the output of a block changes.
    """
    for number, channels in enumerate(found):
        module = model.get_submodule(channels.block)
        shared = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
        turned = copy.deepcopy(module, shared)
        generator = torch.Generator().manual_seed(number)
        keep(turned, channels, torch.randperm(channels.width, generator=generator).to(calls.states.device))
        want, got = calls.run(number, module), calls.run(number, turned)
        allowed = TOLERANCE * max(1.0, want.abs().max().item()) * (1 if want.dtype == torch.float32 else 300)
        if not (want - got).abs().max() <= allowed:
            raise ValueError(
                f"Expected the channels of {channels.block} to be independent of each other, got others when their order is "
                "changed. This architecture's MLPs cannot be cut. Nothing was changed."
            )


@torch.no_grad()
def gather(calls: Sequence[Calls], number: int, module: nn.Module, channels: Channels, done: Any) -> tuple[Covariance, Any]:
    """The covariance of a block's channels over the real tokens, and their mean absolute value."""
    found = Covariance(channels.width, calls[0].states.device)
    size = torch.zeros(channels.width, dtype=torch.float64, device=calls[0].states.device)

    for call in calls:

        def see(values: torch.Tensor, call: Calls = call) -> None:
            shaped = values.view(*call.states.shape[:-1], channels.width)
            found.add(shaped, call.mask)
            real = shaped.flatten(0, 1) if call.mask is None else shaped[call.mask.to(shaped.device) != 0]
            size.add_(real.double().abs().sum(0))

        with at(module, channels.writer, see):
            call.run(number, module)
        done()
    return found, size


def choose(module: nn.Module, channels: Channels, found: Covariance, size: torch.Tensor, width: int) -> tuple[Any, Any]:
    """Choose the channels to keep, in ascending order, and compute the writer's weight for them.

    A channel's score is mean|a| times the norm of its column in the output matrix (close to what Wanda, arXiv 2306.11695,
    does for single weights). The writer's new weight is W C[:, K] (C[K, K] + ridge)^-1, with C the second moments of the
    channels and K the kept ones: the ridge regression of its previous output on the kept channels.
    """
    writer: Any = module.get_submodule(channels.writer)
    weight = writer.weight.data if isinstance(writer, nn.Linear) else writer.weight.data.T  # (width of the states, channels)
    importance = size * weight.double().norm(dim=0)
    kept = importance.topk(width).indices.sort().values
    inner = found.sum[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(width, dtype=inner.dtype, device=inner.device)
    fitted = torch.linalg.solve(inner, found.sum[kept] @ weight.double().T).T
    return kept, (fitted if isinstance(writer, nn.Linear) else fitted.T)
