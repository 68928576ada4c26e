"""`slice_model`: reduces the width of each layer of a model according to its redundancy, before training."""

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
from .memory import release_freed_memory
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
    """A slicing that has passed all checks. Applying it cannot fail partway: it only computes and assigns.

    Attributes:
        model: The stock model.
        wiring: What reads and writes its hidden states.
        gains: Of its norms, by their names in the model.
        bases: Of each block and of the head: Q of shape (width, kept), orthonormal, float32.
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
    """Cut the hidden states of a model to their principal components, in place, with a separate width for each layer.

    SliceGPT (arXiv 2401.15024) with the widths of Dynamic LLM Slicing (arXiv 2411.03513): the inputs and outputs of a layer
    are rotated such that the first components hold most of the signal, and the rest is cut off. A layer that changes the
    hidden states less loses more. The head is untied from the embedding, unless `untie` is False. Call it before the
    model is wrapped or trained.

    With `what="mlp"` the hidden states keep their width, and channels of the MLPs are removed, with widths allocated in the
    same way; the matrices that read them are refitted in closed form. With allocation="uniform" the result is then a stock
    model, which every runtime loads.

    Args:
        model: A causal language model with pre-norm attention and MLP modules, on any device.
        batches: Calibration batches: `input_ids` and, where there is padding, `attention_mask`. Padding is ignored.
        ratio: The mean share to cut, between 0 and 1.
        allocation: "redundancy", or "uniform": the same share for all.
        spread: How strongly shares follow redundancy: from 0 (uniform) to 1 (the least redundant layer keeps its width).
        mean: Whether `ratio` is the mean over the "layers", or the share of the blocks' "parameters", shortcuts included.
        multiple: What widths are multiples of: 8, or 64 for a GPU's tiles.
        what: "hidden", the hidden states; or "mlp", the MLPs' channels.
        untie: Whether a head that is tied to the embedding may be untied. False: such a model is refused.
        progress: Whether to show a progress bar.

    Returns:
        The widths. They are also stored in `model.config.slicing`, unless the result is a stock model.

    Raises:
        ValueError: If an argument is out of range, the batches hold too few tokens, or the model cannot be sliced: its
            logits change when its hidden states are rotated; it is wrapped, quantized, already sliced, or on the meta
            device; it has adapters; or it is being trained. The model is left unchanged.
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
    """Check a slicing and compute its bases without changing anything; see `slice_model`.

    Raises:
        ValueError: As `slice_model`.
    """
    stock = refuse_model(model)
    wiring = find_wiring(type(stock), stock.config)
    tokens = real_tokens(batches, wiring.width)
    layer_map = LayerMap.from_config(stock.config)
    allocate([1.0] * len(wiring.blocks), wiring.width, ratio, 0.0, multiple)  # raises if the ratio leaves too little
    batches = on_device(batches, next(stock.parameters()).device)
    rounds = len(wiring.blocks) * len(batches)
    with torch.no_grad(), evaluating([stock]), tqdm(total=3 * rounds, desc="Slicing", disable=not progress) as bar:
        gains = read_gains(stock, wiring)
        refuse_unequal(stock, wiring, gains, batches[0]["input_ids"])
        release_freed_memory()
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
    """What each norm does besides dividing, by its name in the model.

    Raises:
        ValueError: If one is neither an RMSNorm nor a LayerNorm, or the model has both kinds.
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
    """The principal components of what the norms of each block read, with all earlier blocks sliced; and the last norm."""
    centred = any(gain.centred for gain in gains.values())
    # Allocated together, ahead of the activations: small tensors between these keep freed memory from being reused.
    device = calls[0].states.device
    bases = tuple(torch.empty(wiring.width, width, dtype=torch.float32, device=device) for width in (*widths, widths[0]))
    for number, (block, width) in enumerate(zip(wiring.blocks, widths, strict=True)):
        module = model.get_submodule(block.name)
        basis = gather(calls, number, module, block, bar.update).basis(width, centred)
        advance(calls, number, module, block, basis, bar.update)
        bases[number].copy_(basis)
    last = Covariance(wiring.width, device)
    for call in calls:
        last.add(call.states, call.mask)
    bases[-1].copy_(last.basis(widths[0], centred))
    return bases


def _cost(model: nn.Module, wiring: Wiring) -> Any:
    """A function that returns the share of the blocks' parameters left at given widths."""
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
    """A block's parameter counts: fixed ones, those per unit of its own width, and those per unit of the next width."""
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
    """Slice a model as planned, in place: one block after another, so that little extra memory is needed."""
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
    release_freed_memory()
    # after the blocks, which are smaller now; a tied head gets its own tensor before the table is replaced
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
