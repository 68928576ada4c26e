"""`repair_layers`: prepares a model for dropping layers, and checks that this lowers the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..engines import ProcessGroup, SingleProcess, all_or_none
from ..engines.local import add_whole
from ..importance import evaluate_metric
from ..importance.calibration import Batch, model_inputs
from ..importance.evaluation import on_every_process, to_be_scored
from ..importance.labelled import headless
from ..importance.metrics import is_causal
from ..importance.statistics import real_tokens
from ..surgery.adapters import adapters_of, base_of
from ..surgery.blocks import find_blocks
from ..surgery.drop import plan_drop
from ..surgery.repair import Repair, fit_repairs
from ..surgery.units import block_output
from ..utils import isolated_rng

logger = logging.get_logger("transformers.trimllm_hf")

HELD_OUT = 8  # one in this many batches is held out


@dataclass(frozen=True)
class RepairReport:
    """The result of a repair.

    Attributes:
        applied: Whether the weights were changed, that is, whether the loss is lower with the repair than without.
        plain_loss: The held-out loss of the model without the layers.
        repaired_loss: The held-out loss of the repaired model without the layers.
        repaired: The gaps that were repaired, such as "layers 12 to 19", each in the block in front of it.
        unrepaired: The gaps that were not, with the reasons.
    """

    applied: bool
    plain_loss: float
    repaired_loss: float
    repaired: tuple[str, ...]
    unrepaired: Mapping[str, str]

    @property
    def loss(self) -> float:
        """The lower of the two held-out losses."""
        return self.repaired_loss if self.applied else self.plain_loss

    def __str__(self) -> str:
        losses = f"held-out loss {self.repaired_loss:.4g}, without the repair {self.plain_loss:.4g}"
        if not self.applied:
            return f"The plain drop stays: {losses}."
        left = "".join(f" Not repaired: {name} ({why})." for name, why in self.unrepaired.items())
        return f"Repaired for {', '.join(self.repaired)}: {losses}.{left}"


def repair_layers(
    model: nn.Module,
    layers: Sequence[int],
    batches: Sequence[Batch],
    unit: str = "block",
    *,
    held_out: Sequence[Batch] | None = None,
    penalty: float | None = None,
    part: str | None = None,
) -> RepairReport:
    """Prepare a model for dropping layers: a refitted weight in front of each gap compensates for them as far as possible.

    Call it before `drop_layers(model, layers)`, with the same layers. One weight changes for each gap (in most architectures
    the MLP's down projection in the last kept layer before it), computed in closed form from the batches
    (see `surgery.repair.fit_repairs`). If this does not lower the loss on held-out batches, nothing changes.

    Args:
        model: A transformers model that no engine has wrapped; under one, use `drop_prepared_layers(…, repair=batches)`.
        layers: Positions of the layers that will be dropped.
        batches: Dicts of model inputs, moved to the model's device here; with labels, unless the model is a causal language
            model. Four times as many tokens as the width of the MLP are enough; with fewer, the refit is more restricted.
        unit: "block" or "sublayer", as for `drop_layers`.
        held_out: The batches to evaluate on. Default: one in eight of `batches`, the last ones, which are not fitted on.
        penalty: Strength of the pull towards the old weights, relative to the features' mean square. Default: chosen for
            each gap on one in eight of the batches to fit on.
        part: For an encoder-decoder, the stack that the layers belong to.

    Returns:
        What was repaired, and the losses.

    Raises:
        ValueError: If the layers cannot be dropped, there are too few tokens, nothing can be repaired in this architecture,
            or the model has adapters. Nothing has changed.
    """
    plan_drop(model, layers, unit, part=part)  # raises if the layers cannot be dropped
    repair, report = fit_and_evaluate(model, layers, batches, held_out, unit, penalty=penalty, part=part)
    if report.applied:
        add_whole(repair.changes(model))
    return report


def fit_and_evaluate(
    model: nn.Module,
    layers: Sequence[int],
    batches: Sequence[Batch],
    held_out: Sequence[Batch] | None,
    unit: str,
    *,
    penalty: float | None = None,
    part: str | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Repair, RepairReport]:
    """Fit a repair and evaluate whether it lowers the loss; nothing is changed. See `repair_layers`.

    Raises:
        ValueError: If there are no batches to fit or evaluate on, there is no place for a repair, or the model has adapters.
    """
    process_group = process_group or SingleProcess()
    with all_or_none(process_group):
        refuse_adapters(model)
        batches = list(batches)
        if held_out is None:
            share = max(1, len(batches) // HELD_OUT)
            batches, held_out = batches[:-share], batches[-share:]
        if not batches or not held_out:
            raise ValueError("Expected at least two batches, one to fit on and one to judge by, got fewer. Give more.")
    with all_or_none(process_group):
        (repair,) = fit(model, [layers], batches, unit, penalty=penalty, part=part, process_group=process_group)
        refuse_without_refits(repair)
        return repair, evaluate_repair(model, repair, held_out, process_group=process_group)


def refuse_without_refits(repair: Repair) -> None:
    """Refuse a repair that does nothing.

    Raises:
        ValueError: With the reasons.
    """
    if not repair.refits:
        reasons = "; ".join(f"{gap}: {why}" for gap, why in repair.unrepaired.items())
        raise ValueError(
            f"Expected layers whose loss can be repaired, got none ({reasons}). Drop them without a repair, or give more "
            "calibration tokens where there are too few. Nothing was changed."
        )


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters: a repair changes its base, which is not part of an adapter's checkpoint.

    Raises:
        ValueError: With what to do instead.
    """
    if adapters_of(base_of(model)):
        raise ValueError(
            f"Expected a model without adapters to repair, got {type(model).__name__} with some: what changes is the base, "
            "which is not in an adapter's checkpoint. Repair and drop before the adapters are added, save that base, and "
            "train adapters on it; or drop without a repair."
        )


def fit(
    model: nn.Module,
    candidates: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    unit: str = "block",
    *,
    penalty: float | None = None,
    part: str | None = None,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> list[Repair]:
    """Fit the repairs for candidate sets of layers on calibration batches; see `fit_repairs`."""
    process_group, batches = process_group or SingleProcess(), list(batches)
    everyones = on_every_process(model, batches, "repair", process_group, filler_batch)
    with isolated_rng(0), to_be_scored(model), process_group.heard(model):
        inputs = []
        for number, batch in enumerate(everyones):
            tokens, mask = real_tokens(model, batch, part)
            if mask is None and not {"input_ids", "inputs_embeds"} & set(batch):  # images, audio: all tokens are real
                mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            if number >= len(batches):  # a pass only to stay in step with the other processes
                mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            inputs.append((headless(model, model_inputs(batch)), mask))
        return fit_repairs(model, candidates, inputs, unit, penalty=penalty, part=part, process_group=process_group)


def evaluate_repair(
    model: nn.Module,
    repair: Repair,
    held_out: Sequence[Batch],
    *,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> RepairReport:
    """Evaluate whether a repair lowers the held-out loss of a model without the layers. No weights are changed.

    Raises:
        ValueError: If there are no batches to evaluate on.
    """
    how: dict[str, Any] = {"process_group": process_group, "filler_batch": filler_batch}
    plain, repaired = (loss_without(model, repair, held_out, refitted=refitted, **how) for refitted in (False, True))
    names = tuple(str(refit.gap) for refit in repair.refits)
    unrepaired = {str(gap): why for gap, why in repair.unrepaired.items()}
    # NaN is not lower
    return RepairReport(bool(names) and repaired < plain, plain, repaired, names, unrepaired)


def loss_without(
    model: nn.Module,
    repair: Repair,
    held_out: Sequence[Batch],
    *,
    refitted: bool = True,
    process_group: ProcessGroup | None = None,
    filler_batch: Batch | None = None,
) -> float:
    """The loss of a model without the layers of a repair, with or without the repair.

    For a model that predicts its own input and gets no labels, the input is the label. For any other model without labels it
    is the distance of the last hidden states from those of the full model, 1 - cos, mean over tokens.
    """
    batches, spare = [_labelled(model, batch) for batch in held_out], filler_batch and _labelled(model, filler_batch)
    process_group = process_group or SingleProcess()
    with_labels = all(batch.get("labels") is not None for batch in (*batches, *([spare] if spare else [])))
    if all(process_group.gather(with_labels)):
        with repair.previewed(model, refitted):
            return evaluate_metric(model, batches, process_group=process_group, filler_batch=spare)
    return _distance(model, repair, batches, refitted, process_group, spare)


def _labelled(model: nn.Module, batch: Batch) -> Batch:
    if batch.get("labels") is not None or not is_causal(model) or "input_ids" not in batch:
        return batch
    mask = batch.get("attention_mask")
    labels = batch["input_ids"]
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


def _distance(
    model: nn.Module,
    repair: Repair,
    batches: list[Batch],
    refitted: bool,
    process_group: ProcessGroup,
    filler_batch: Batch | None,
) -> float:
    last = find_blocks(base_of(model), repair.part).blocks[-1]
    states: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _, args, output: states.append(block_output(output)))
    total = torch.zeros(2, dtype=torch.float64)
    try:
        everyones = on_every_process(model, batches, "repair", process_group, filler_batch)
        with isolated_rng(0), to_be_scored(model), process_group.heard(model):
            for number, batch in enumerate(everyones):
                _, mask = real_tokens(model, batch, repair.part)
                for without in (nullcontext(), repair.previewed(model, refitted)):
                    with without:
                        model(**model_inputs(batch))
                cosine = torch.cosine_similarity(states[0].float(), states[1].float(), dim=-1)
                cosine = cosine if mask is None else cosine[mask.to(cosine.device) != 0]
                if number < len(batches):
                    total += torch.tensor([float((1 - cosine).sum()), cosine.numel()], dtype=torch.float64)
                states.clear()
    finally:
        hook.remove()
    distance, tokens = process_group.all_reduce(total).tolist()
    return distance / tokens if tokens else math.nan
