"""`fit_repairs`: a new weight in front of each gap, from the input side on."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ...engines import ProcessGroup, SingleProcess
from ..adapters import base_of
from ..blocks import find_blocks
from .gaps import Gap, Place, find_gaps, places
from .normal_equations import NormalEquations, State
from .output_projection import OutputProjection, shape_of
from .probe import probe
from .repair import Refit, Repair
from .ridge import Sums, best_penalty, solve

logger = logging.get_logger("transformers.trimllm_hf")

PENALTIES = (0.3, 0.1, 1.0, 3.0)  # the first if there is nothing to choose by
HELD_OUT = 8  # one in this many batches is held out to choose among them
INFINITE = "the penalty is infinite"
ENOUGH = 4  # tokens per feature of a refit

Inputs = tuple[Mapping[str, Any], torch.Tensor | None]


def fit_repairs(
    model: nn.Module,
    candidates: Sequence[Sequence[int]],
    batches: Sequence[Inputs],
    unit: str = "block",
    *,
    penalty: float | None = None,
    part: str | None = None,
    process_group: ProcessGroup | None = None,
) -> list[Repair]:
    """Fit the repairs for one or more candidate sets of dropped layers.

    For each gap, the output projection in front of it (in most blocks the MLP's down projection) gets a new weight, so that
    the hidden states after it are as close as possible to those of the unchanged model after the gap. The gaps are fitted
    from the input side on, each on the hidden states of the model as it is with the gaps in front of it dropped and
    repaired, so that a refit also makes up for what the earlier ones could not. With a the projection's input and R the
    difference between the two hidden states, the weight changes by (sum a^T a + penalty D)^-1 sum a^T R, with D the mean of
    the first sum's diagonal: ridge regression around the old weight. It generalises ReplaceMe (Shopkhoev et al.,
    arXiv 2505.02819), where the new weight is the old one times a matrix; that form is used if there are few tokens. The
    model is not changed here.

    The cost is one pass over the batches, and for each gap one through the layers in front of it that are kept.

    Args:
        model: A transformers model, unwrapped, in evaluation mode, without gradients and without a cache.
        candidates: The sets of layers, by their positions in the model as it is now.
        batches: The model's inputs, and a mask of the real tokens of shape (rows, tokens); None: all. Each process has its
            share, with the same number of batches.
        unit: What a layer is, "block" or "sublayer", as for `drop_layers`.
        penalty: Strength of the ridge penalty; infinite: nothing changes. None: for each gap, the value of `PENALTIES` that
            does best on one in eight batches when fitted on the others; the final fit uses all batches.
        part: For an encoder-decoder, the stack that the layers belong to.
        process_group: The processes of the run.

    Returns:
        A repair for each candidate.
    """
    process_group = process_group or SingleProcess()
    base = base_of(model)
    blocks = list(find_blocks(base, part).blocks)
    behind = places(model, unit, part)
    wanted = [find_gaps(behind, layers, unit) for layers in candidates]
    gaps = list(dict.fromkeys(gap for gaps in wanted for gap in gaps))
    ends = {place for gap in gaps for place in (gap.before, None if unit == "block" else gap.last) if place is not None}
    forms, projections = probe(base, ends, batches[0][0], unit, part, process_group)
    tokens = sum(process_group.gather(sum(_num_tokens(*batch) for batch in batches)))
    unrepaired: dict[Gap, str] = {}
    equations: dict[Gap, NormalEquations] = {}
    for gap in gaps:
        found = _equations(gap, blocks, projections, tokens)
        if isinstance(found, NormalEquations):
            equations[gap] = found
        else:
            unrepaired[gap] = found
    if penalty == math.inf:
        unrepaired |= dict.fromkeys(equations, INFINITE)
        equations.clear()

    def up_to(place: Place, layers: Collection[int], refits: Sequence[Refit]) -> AbstractContextManager[None]:
        """Run the model without some layers, with some refits, and without what is behind a place."""
        beyond = range(behind.index(place) + 1, len(behind))
        return Repair((*sorted({*layers, *beyond}),), tuple(refits), {}, forms, unit, part).previewed(model)

    if equations:
        with up_to(max((gap.last for gap in equations), key=behind.index), (), ()):
            _record_targets(base, list(equations.values()), batches)
    repairs = []
    for layers, gaps in zip(candidates, wanted, strict=True):
        refits: list[Refit] = []
        missing = {gap: unrepaired[gap] for gap in gaps if gap in unrepaired}
        for number, gap in enumerate(gaps):
            if gap.before is None or gap in missing:
                continue
            each, front = equations[gap], behind.index(gap.before)
            with up_to(gap.before, [layer for layer in layers if layer < front], refits):
                _sum_up(base, each, batches, penalty is None)
            change = _solved(each, penalty, number, process_group)
            if change is None:
                missing[gap] = "its equations have no solution in numbers"
                logger.warning(f"No repair in front of {gap}: {missing[gap]}. The weight there stays as it is.")
            else:
                refits.append(_refit(gap, each, change, process_group))
        repairs.append(Repair(tuple(sorted(layers)), tuple(refits), missing, forms, unit, part))
    return repairs


def _equations(
    gap: Gap, blocks: Sequence[nn.Module], projections: Mapping[Any, OutputProjection], tokens: int
) -> NormalEquations | str:
    """The equations for a gap, still without tokens, or why there are none."""
    if gap.before is None:
        return "no layer stays in front of it"
    block, last, projection = blocks[gap.before.position], blocks[gap.last.position], projections.get(gap.before)
    if projection is None:
        return f"no linear map of {type(block).__name__} adds straight to the hidden states"
    other = projections.get(gap.last)
    if projection.norm is not None:
        other = other or OutputProjection(projection.name, projection.scale, projection.norm)
        norms = [dict(one.named_modules()).get(str(norm)) for one, norm in ((block, projection.norm), (last, other.norm))]
        if type(norms[0]) is not type(norms[1]):
            return f"it does not end with a norm like that of {type(block).__name__} in front of it"
    elif gap.last.inside and (other is None or other.norm is not None):
        return f"what its last attention adds to the hidden states of {type(last).__name__} cannot be told apart"
    inputs, width = shape_of(block.get_submodule(projection.name))
    needed = ENOUGH * min(inputs, width)
    if tokens < needed:
        return f"it takes {needed} calibration tokens at least, there are {tokens}"
    before = State(block, projection, gap.before.inside)
    return NormalEquations(before, State(last, other, gap.last.inside), by_output=tokens < ENOUGH * inputs)


def _record_targets(base: nn.Module, equations: Sequence[NormalEquations], batches: Sequence[Inputs]) -> None:
    """The hidden states that the refits aim at: one pass over the batches."""
    for inputs, _ in batches:
        with ExitStack() as recording:
            for each in equations:
                recording.enter_context(each.recording())
            base(**inputs)


def _sum_up(base: nn.Module, equations: NormalEquations, batches: Sequence[Inputs], hold_out: bool) -> None:
    """The sums of one gap: one pass over the batches."""
    share = min(HELD_OUT, len(batches))
    for number, (inputs, mask) in enumerate(batches):
        held_out = hold_out and number % share == share - 1 > 0
        with equations.collecting(equations.targets[number], mask, held_out):
            base(**inputs)


def _num_tokens(inputs: Mapping[str, Any], mask: torch.Tensor | None) -> int:
    if mask is not None:
        return int((mask != 0).sum())
    names = ("decoder_input_ids", "input_ids", "inputs_embeds")
    return next(int(inputs[name].shape[:2].numel()) for name in names if name in inputs)


def _solved(
    equations: NormalEquations, penalty: float | None, number: int, process_group: ProcessGroup
) -> torch.Tensor | None:
    """One gap's change, of shape (features, width), float32; computed by one process, so that all have the same values."""
    fitted, held_out = (
        Sums(process_group.all_reduce(sums.gram), process_group.all_reduce(sums.cross))
        for sums in (equations.fitted, equations.held_out)
    )
    equations.clear()
    change: torch.Tensor | None = torch.zeros_like(fitted.cross)
    if number % process_group.world_size == process_group.rank:
        if penalty is None:
            penalty = best_penalty(fitted, held_out, PENALTIES) if held_out.gram.any() else PENALTIES[0]
        change = solve(fitted + held_out, penalty)
    change = process_group.all_reduce(torch.full_like(fitted.cross, torch.nan) if change is None else change)
    return change.float() if torch.isfinite(change).all() else None


def _refit(gap: Gap, equations: NormalEquations, change: torch.Tensor, process_group: ProcessGroup) -> Refit:
    """Convert the change to the shapes of the parameters."""
    assert gap.before is not None
    before, last, projection = equations.before.block, equations.last.block, equations.projection
    changes: dict[str, torch.Tensor] = {}
    closing: nn.Module | None = None
    with process_group.gathered([*before.modules(), *last.modules()]), torch.autocast(change.device.type, enabled=False):
        weight: Any = equations.module.weight
        bias: Any = getattr(equations.module, "bias", None)
        transposed = isinstance(equations.module, Conv1D)
        if equations.by_output:
            own = weight.float() if transposed else weight.float().T
            of_weight, of_bias = own @ change, None if bias is None else bias.float() @ change
        else:
            inputs = shape_of(equations.module)[0]
            of_weight, of_bias = change[:inputs], None if bias is None else change[inputs]
        changes[f"{projection.name}.weight"] = (of_weight if transposed else of_weight.T).detach().contiguous()
        if of_bias is not None:
            changes[f"{projection.name}.bias"] = of_bias.detach()
        if projection.norm is not None:
            assert equations.last.projection is not None
            norm, others = before.get_submodule(projection.norm), last.get_submodule(str(equations.last.projection.norm))
            whole: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), False) for p in others.parameters()}
            closing = copy.deepcopy(others, whole)
            for name, parameter in norm.named_parameters():
                difference = others.get_parameter(name).detach().float() - parameter.detach().float()
                changes[f"{projection.norm}.{name}"] = difference
    return Refit(gap, gap.before.position, projection, changes, closing)
