"""`slice_model`: makes each layer of a model as wide as its redundancy allows, before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..layer_map import LayerMap
from ..surgery.custom_models import update_classes
from ..surgery.unshare_config import unshare_config
from ..utils import evaluating
from .allocation import allocate, redundancy_of
from .channels import slice_channels
from .classes import SLICED
from .modules import assign, norm_eps, replace_norm, shape_block
from .preconditions import on_device, real_tokens, refuse_arguments, refuse_model, refuse_tied
from .principal import Covariance
from .rotation import Gain, read_gain, rotated_block, rotated_embedding, rotated_reader
from .signals import Calls, advance, gather, observe
from .slice_map import SliceMap, next_widths
from .verify import refuse_unequal
from .wiring import Block, Wiring, find_wiring


@dataclass(frozen=True)
class PlannedSlice:
    """A slicing that has passed all checks. Applying it cannot fail halfway: it only computes and assigns.

    Attributes:
        model: The stock model.
        wiring: What reads and writes its hidden states.
        gains: Of its norms, by their names in the model.
        bases: Of each block, and of the head: Q of shape (width, kept), orthonormal, float32.
        slice_map: The map after it.
    """

    model: PreTrainedModel
    wiring: Wiring
    gains: dict[str, Gain]
    bases: tuple[torch.Tensor, ...]
    slice_map: SliceMap


def slice_model(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    ratio: float = 0.25,
    allocation: str = "redundancy",
    spread: float = 0.5,
    mean: str = "layers",
    multiple: int = 8,
    what: str = "hidden",
    untie: bool = True,
    progress: bool = True,
) -> SliceMap:
    """Cut the hidden states of a model to their principal components, each layer to a width of its own, in place.

    SliceGPT (arXiv 2401.15024) with the widths of Dynamic LLM Slicing (arXiv 2411.03513): what a layer reads and writes is
    rotated, so that the first components hold most of it, and the rest is cut off. A layer that changes the hidden states
    little loses more. The head is untied from the embedding, unless that is refused. To be called before the model is
    wrapped or trained.

    With `what="mlp"` the hidden states stay, and channels of the MLPs go, by the same widths; the matrices behind them are
    refitted in closed form. With allocation="uniform" what is left is a stock model, which every runtime loads.

    Args:
        model: A causal language model with norms in front of its attentions and MLPs, on any device.
        batches: Calibration batches: `input_ids` and, where there is padding, `attention_mask`. Padding does not count.
        ratio: The mean share to cut, within 0 and 1.
        allocation: "redundancy", or "uniform": the same share for all.
        spread: How far shares follow redundancy: from 0 (uniform) to 1 (the least redundant layer keeps its width).
        mean: Whether `ratio` is the mean over the "layers", or the share of the blocks' "parameters", shortcuts counted.
        multiple: What widths are multiples of: 8, or 64 for a GPU's tiles.
        what: "hidden", the hidden states; or "mlp", the MLPs' channels.
        untie: Whether a head that is tied to the embedding may become a matrix of its own. False: such a model is refused.
        progress: Whether to show a progress bar.

    Returns:
        The widths. They also stand in `model.config.slicing`, unless the model is a stock one.

    Raises:
        ValueError: If an argument is out of range, the batches hold too few tokens, or the model cannot be sliced: one
            whose logits do not stay the same when its hidden states are rotated, a wrapped, quantized, adapted or already
            sliced one, one without memory (meta), or one that is being trained. Nothing has changed then.
    """
    refuse_arguments(ratio, allocation, spread, mean, multiple, what)
    if what == "mlp":
        return slice_channels(model, batches, ratio, allocation, spread, multiple, progress)
    if not untie:
        refuse_tied(model)
    return apply(plan(model, batches, ratio, allocation, spread, mean, multiple, progress))


def plan(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    ratio: float,
    allocation: str,
    spread: float,
    mean: str,
    multiple: int,
    progress: bool = False,
) -> PlannedSlice:
    """Check a slicing and find its bases without changing anything; see `slice_model`.

    Raises:
        ValueError: As `slice_model`.
    """
    stock = refuse_model(model)
    wiring = find_wiring(type(stock), stock.config)
    tokens = real_tokens(batches, wiring.width)
    layer_map = LayerMap.from_config(stock.config)
    allocate([1.0] * len(wiring.blocks), wiring.width, ratio, 0.0, multiple)  # raises on a ratio that leaves too little
    batches = on_device(batches, next(stock.parameters()).device)
    rounds = len(wiring.blocks) * len(batches)
    with torch.no_grad(), evaluating([stock]), tqdm(total=3 * rounds, desc="Slicing", disable=not progress) as bar:
        gains = read_gains(stock, wiring)
        refuse_unequal(stock, wiring, gains, batches[0]["input_ids"])
        calls, influence = observe(stock, batches, bar.update)
        redundancy = redundancy_of(influence) if allocation == "redundancy" else [1.0] * len(influence)
        cost = _cost(stock, wiring) if mean == "parameters" else None
        widths = allocate(redundancy, wiring.width, ratio, spread, multiple, cost)
        bases = find_bases(stock, wiring, gains, calls, widths, bar)
    slice_map = SliceMap(
        wiring.width,
        tuple(widths),
        ratio=ratio,
        allocation=allocation,
        spread=spread if allocation == "redundancy" else 0.0,
        mean=mean,
        redundancy=tuple(influence),
        tokens=tokens,
        base_model=layer_map.base_model,
        base_revision=layer_map.base_revision,
    )
    return PlannedSlice(stock, wiring, gains, bases, slice_map)


def read_gains(model: nn.Module, wiring: Wiring) -> dict[str, Gain]:
    """What each norm does beside dividing, by its name in the model.

    Raises:
        ValueError: If one is neither an RMSNorm nor a LayerNorm, or both kinds are there.
    """
    names = [f"{block.name}.{norm}" for block in wiring.blocks for norm in block.norms] + [wiring.norm]
    norms = {name: model.get_submodule(name) for name in names}
    gains = {name: read_gain(norm, wiring.width, norm_eps(norm)) for name, norm in norms.items()}
    if len({gain.centred for gain in gains.values()}) > 1:
        raise ValueError(
            f"Expected norms of one kind, got RMSNorms and LayerNorms in {type(model).__name__}. Nothing was changed."
        )
    return gains


def find_bases(
    model: nn.Module, wiring: Wiring, gains: dict[str, Gain], calls: list[Calls], widths: Sequence[int], bar: Any
) -> tuple[torch.Tensor, ...]:
    """The principal components of what each block reads when all in front of it are sliced, and of what the head reads."""
    centred = any(gain.centred for gain in gains.values())
    bases = []
    for number, (block, width) in enumerate(zip(wiring.blocks, widths, strict=True)):
        module = model.get_submodule(block.name)
        basis = gather(calls, number, module, block, bar.update).basis(width, centred)
        advance(calls, number, module, block, basis, bar.update)
        bases.append(basis.float())
    last = Covariance(wiring.width, bases[0].device)
    for call in calls:
        last.add(call.states, call.mask)
    bases.append(last.basis(widths[0], centred).float())
    return tuple(bases)


def _cost(model: nn.Module, wiring: Wiring) -> Any:
    """The share of the blocks' parameters that is left at widths."""
    sizes = [_linear_size(model.get_submodule(block.name), block, wiring.width) for block in wiring.blocks]
    full = sum(sum(p.numel() for p in model.get_submodule(block.name).parameters()) for block in wiring.blocks)

    def cost(widths: Sequence[int]) -> float:
        parts = [
            fixed + of_width * width + of_after * after + width * after
            for (fixed, of_width, of_after), width, after in zip(sizes, widths, next_widths(widths), strict=True)
        ]
        return sum(parts) / full

    return cost


def _linear_size(module: Any, block: Block, full: int) -> tuple[int, int, int]:
    """A block's parameters: those that stay, and how many there are for each number of its own width, and of the next."""
    own = after = 0
    norms = sum(p.numel() for norm in block.norms for p in module.get_submodule(norm).parameters())
    for half, first in ((block.attention, not block.parallel), (block.mlp, False)):
        for name in half.readers:
            own += module.get_submodule(name).weight.numel() // full
        writer = module.get_submodule(half.writer)
        size = sum(p.numel() for p in writer.parameters()) // full
        own, after = (own + size, after) if first else (own, after + size)
    total = sum(p.numel() for p in module.parameters())
    return total - norms - (own + after) * full, own, after


@torch.no_grad()
def apply(planned: PlannedSlice) -> SliceMap:
    """Slice a model as planned, in place: a block after the other, so that little memory is needed beside its own."""
    model, wiring, gains, bases = planned.model, planned.wiring, planned.gains, planned.bases
    widths = planned.slice_map.widths
    centred = any(gain.centred for gain in gains.values())
    for number, (block, width, after) in enumerate(zip(wiring.blocks, widths, next_widths(widths), strict=True)):
        module = model.get_submodule(block.name)
        own = {norm: gains[f"{block.name}.{norm}"] for norm in block.norms}
        tensors = dict(rotated_block(module, block, own, bases[number].double(), bases[number + 1].double()))
        shape_block(module, block, wiring.width, width, after)
        for name, tensor in tensors.items():
            assign(module, name, tensor)
    # behind the blocks, which are smaller now; a tied head gets a tensor of its own before the table goes
    head = rotated_reader(model.get_submodule(wiring.head), gains[wiring.norm], bases[-1].double())
    for kind, tensor in dict(head).items():
        assign(model, f"{wiring.head}.{kind}", tensor)
    replace_norm(model, wiring.norm, wiring.width)
    for name in wiring.embeddings:
        assign(model, f"{name}.weight", rotated_embedding(model.get_submodule(name), bases[0].double(), centred))
    unshare_config(model)
    model.config.slicing = planned.slice_map.to_dict()
    model.config.tie_word_embeddings = False
    update_classes(model, SLICED)
    return planned.slice_map
