"""`drop_prepared_layers`: a drop in a hand-written Accelerate loop, under any engine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..engines import Changes, Engine, ProcessGroup, attach
from ..importance.calibration import Batch
from ..layer_map import LayerMap
from ..surgery.drop import PlannedDrop, plan_drop, refuse_per_layer_tensors
from ..utils import isolated_rng
from .repair import fit_and_evaluate

logger = logging.get_logger("transformers.trimllm_hf")


def drop_prepared_layers(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    layers: Sequence[int],
    unit: str = "block",
    step: int | None = None,
    part: str | None = None,
    repair: Sequence[Batch] | None = None,
) -> LayerMap:
    """Drop layers of a model while it trains, in place: call it after `optimizer.step()`, on every process.

    The model, the optimizer and the scheduler remain the same objects and keep their state.

    Args:
        accelerator: The Accelerator that prepared them.
        model: The model as `accelerator.prepare` returned it.
        optimizer: The optimizer as `accelerator.prepare` returned it.
        layers: Positions in the model as it is now, from 0; the same on every process.
        unit: "block" or "sublayer", as for `drop_layers`.
        step: Optimizer step, for the map's history.
        part: As for `drop_layers`.
        repair: This process's share of the batches on which to repair the model for the drop, as `repair_layers` does.
            None: a plain drop.

    Returns:
        The kept-layer map, which is also stored in the unwrapped model's `config.trim`.

    Raises:
        ValueError: If the engine, the optimizer, the architecture, the layers or the repair do not allow it. Nothing has
            changed.
    """
    engine = attach(accelerator, model, optimizer)
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    try:
        drop = plan_drop(unwrapped, layers, unit, step=step, part=part)
    except Exception as error:  # the other processes would drop on their own
        engine.raise_on_all(error)
        raise
    refuse_other_layers(engine, layers, unit)
    if repair is None:
        return apply_drop(engine, drop)
    found, report = fit_and_evaluate(drop.model, layers, repair, None, unit, part=part, process_group=engine)
    logger.info(str(report))
    return apply_drop(engine, drop, found.changes(drop.model) if report.applied else ())


def refuse_other_layers(process_group: ProcessGroup, layers: Sequence[int], unit: str) -> None:
    """Refuse to drop different layers on different processes: each would train a different model.

    Raises:
        ValueError: On every process, with the layers of each.
    """
    everyones = process_group.gather((sorted(layers), unit))
    if any(each != everyones[0] for each in everyones):
        named = "; ".join(f"process {rank}: {layers} ({unit})" for rank, (layers, unit) in enumerate(everyones))
        raise ValueError(
            f"Expected the same layers on every process, got {named}. Score them with the same numbers everywhere: reduce "
            "what each process has measured (accelerator.reduce) before you choose. Nothing was changed."
        )


def apply_drop(engine: Engine, drop: PlannedDrop, changes: Changes = ()) -> LayerMap:
    """Carry out a planned drop under an engine; random state is preserved, and the dropped layers are freed.

    Args:
        engine: The engine.
        drop: The drop.
        changes: What a repair adds to kept parameters.

    Raises:
        ValueError: If parameters outside the layers would change their shape. Nothing has changed.
    """
    refuse_per_layer_tensors(drop)
    if changes:
        engine.add(changes)
    with isolated_rng(0):  # an engine may use random numbers when it is rebuilt
        layer_map = engine.edit(drop.apply, lambda: drop.removed_parameters)
    if "torch._dynamo" in sys.modules:  # compiled graphs contain the dropped layers
        torch.compiler.reset()
    gc.collect()  # FSDP2 and DeepSpeed hold parameters in reference cycles
    return layer_map
