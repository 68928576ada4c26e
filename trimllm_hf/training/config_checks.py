"""Checks of the settings on construction: values that are invalid for every model are refused."""

from __future__ import annotations

import math
from typing import Any

from ..layer_map import UNITS


def check_settings(config: Any) -> None:
    """Check everything that depends neither on the model nor on the run.

    Raises:
        ValueError: If a value is out of range, or contradicts another.
    """
    check_target(config)
    check_unit(config)
    check_schedule(config)
    for name, least in (("layers_per_drop", 1), ("protect_first", 0), ("protect_last", 0), ("calibration_size", 1)):
        at_least(name, getattr(config, name), least)
    check_selection(config)
    check_sparse_update(config)
    check_repair(config)
    check_stop_rules(config)
    check_distillation(config)


def check_target(config: Any) -> None:
    """Check the target.

    Raises:
        ValueError: If it is not given exactly once, or a value is out of range.
    """
    targets = [value for value in (config.target_layers, config.target_ratio) if value is not None]
    if len(targets) > 1 or (not targets and not config.has_budget):
        raise ValueError(
            "Expected exactly one of target_layers (a number of layers) and target_ratio (a share), or a budget "
            f"(max_latency_ms, max_memory_gb), got target_layers={config.target_layers} and "
            f"target_ratio={config.target_ratio}. Set one of them."
        )
    if config.target_ratio is not None and not 0 < config.target_ratio < 1:
        raise ValueError(
            f"Expected target_ratio above 0 and below 1, got {config.target_ratio}. It is the share of layers that "
            "is kept: 0.5 keeps half of them."
        )
    if config.target_layers is not None:
        at_least("target_layers", config.target_layers, 1)


def check_unit(config: Any) -> None:
    """Check the unit and the part.

    Raises:
        ValueError: If there is no such unit or part, or they cannot be combined.
    """
    if config.unit not in UNITS:
        raise ValueError(f"Expected unit='block' or 'sublayer', got {config.unit!r}.")
    if config.unit != "block" and config.portable:
        raise ValueError("Expected unit='block' with portable=True: no other runtime knows blocks that lack a sublayer.")
    if config.unit != "block" and config.part is not None:
        raise ValueError(f"Expected unit='block' for a part of an encoder-decoder ({config.part}), got unit='sublayer'.")
    if config.part not in (None, "decoder", "encoder"):
        raise ValueError(f"Expected part='decoder', 'encoder' or None, got {config.part!r}.")


def check_schedule(config: Any) -> None:
    """Check the schedule.

    Raises:
        ValueError: If there is no such schedule.
    """
    if config.drop_every not in ("auto", "once", "spread", "epoch"):
        if not config.drop_every.isdecimal() or int(config.drop_every) < 1:
            raise ValueError(
                f"Expected drop_every to be 'auto', 'once', 'spread', 'epoch' or a number of steps of at least 1, got "
                f"{config.drop_every!r}."
            )


def check_selection(config: Any) -> None:
    """Check the selection budget, and that the score uses the metric that is set for a scan.

    Raises:
        ValueError: If the budget is not a share, or the score does not use the metric of a scan.
    """
    share = config.selection_budget
    if share is not None and not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            f"Expected selection_budget above 0 and up to 1, a share of the run, got {share!r}. To choose "
            "without a pass, name an importance that takes none ('last')."
        )
    if config.scan_memory_gb is not None and not config.scan_memory_gb > 0:
        raise ValueError(f"Expected scan_memory_gb above 0, or None, got {config.scan_memory_gb}.")
    if config.scan_metric != "loss" and config.score != "sensitivity":
        raise ValueError(
            f"Expected importance='sensitivity' for scan_metric={config.scan_metric!r}, got {config.importance!r}, which "
            "does not measure it."
        )


def check_sparse_update(config: Any) -> None:
    """Check the share of the layers that trains.

    Raises:
        ValueError: If it is not a share, or the unit is sublayers.
    """
    if config.trainable_ratio is not None and not 0 < config.trainable_ratio <= 1:
        raise ValueError(f"Expected trainable_ratio above 0 and up to 1, or None, got {config.trainable_ratio}.")
    if config.unit != "block" and config.trainable_ratio is not None:
        raise ValueError("Expected unit='block' with trainable_ratio, the share of blocks that train, got 'sublayer'.")


def check_stop_rules(config: Any) -> None:
    """Check the budgets, the rule on a metric, and the healing share.

    Raises:
        ValueError: If a value is out of range, or requires another one.
    """
    for name in ("max_latency_ms", "max_memory_gb"):
        value = getattr(config, name)
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"Expected {name} to be a number above 0, or None, got {value!r}.")
    at_least("latency_batch_size", config.latency_batch_size, 1)
    at_least("latency_prompt_tokens", config.latency_prompt_tokens, 1)
    if config.healing_ratio is not None and not (is_number(config.healing_ratio) and 0 <= config.healing_ratio < 1):
        raise ValueError(
            f"Expected healing_ratio from 0 up to below 1, got {config.healing_ratio!r}. It is the share of the steps "
            "after the last drop."
        )
    if config.max_metric_drop is None:
        for name in ("stop_metric", "reference_metric"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"Expected max_metric_drop beside {name}={getattr(config, name)!r}, got none. Set how much worse "
                    "than the reference the trimmed model may be."
                )
    elif not (is_number(config.max_metric_drop) and config.max_metric_drop >= 0):
        raise ValueError(f"Expected max_metric_drop to be a number of at least 0, got {config.max_metric_drop!r}.")
    elif config.drop_every == "once":
        raise ValueError(
            "Expected drops while training for max_metric_drop, got drop_every='once', which drops everything before "
            "the first evaluation. Use 'auto', 'spread', 'epoch' or a number of steps."
        )
    if config.reference_metric is not None and not is_number(config.reference_metric):
        raise ValueError(f"Expected reference_metric to be a number, or None, got {config.reference_metric!r}.")


def check_repair(config: Any) -> None:
    """Check the settings for repairs.

    Raises:
        ValueError: If a value is out of range.
    """
    if config.repair not in ("auto", "required", "none"):
        raise ValueError(f"Expected repair='auto', 'required' or 'none', got {config.repair!r}.")
    if config.repair_tokens is not None:
        at_least("repair_tokens", config.repair_tokens, 1)


def check_distillation(config: Any) -> None:
    """Check the distillation settings.

    Raises:
        ValueError: If a value is out of range.
    """
    if not (is_number(config.distill_weight) and 0 <= config.distill_weight <= 1):
        raise ValueError(f"Expected distill_weight from 0 to 1, got {config.distill_weight!r}.")
    if not (is_number(config.distill_temperature) and config.distill_temperature > 0):
        raise ValueError(f"Expected distill_temperature to be a number above 0, got {config.distill_temperature!r}.")


def at_least(name: str, value: Any, least: int) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Raises:
        ValueError: With the setting's name.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected {name} to be a whole number of at least {least}, got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
