"""Checks at the start of a run that refuse what would fail later or have no effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel

from ..engines import Engine
from ..importance import goes_by_loss, needs_data, refuse_not_per_ms
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from .config import TrimConfig
from .selection import LayerSelector, takes_calibration_examples


def check_scores(config: TrimConfig) -> None:
    """Refuse unknown scores and, if scores per ms are requested, scores that have no meaning per ms.

    Raises:
        ValueError: Listing those that exist.
    """
    chooses = {config.score, config.warm_up_importance} - {"none"}
    for name in chooses | {config.tie_breaker} - {None}:
        needs_data(str(name))
    if config.importance_per_ms:
        refuse_not_per_ms(*chooses)


def refuse_several(callbacks: Sequence[Any]) -> None:
    """Refuse several callbacks that would each trim the model.

    Raises:
        ValueError: With what to do for both parts of an encoder-decoder.
    """
    if len(callbacks) > 1:
        raise ValueError(
            f"Expected one TrimCallback, got {len(callbacks)}: a run trims one stack of layers. For both parts of an "
            "encoder-decoder train twice: the second run's base is what the first has saved, with model.config.trim = None."
        )


def refuse_reached_target(config: TrimConfig, base_num_layers: int, num_layers: int) -> None:
    """Refuse a model that is already at the target. All counts are in the unit.

    Raises:
        ValueError: With the arithmetic.
    """
    if config.has_budget or config.resolve_target(base_num_layers, num_layers) < num_layers:
        return
    said, lower = f"target_layers={config.target_layers}", "target_layers"
    if config.target_ratio is not None:
        said = f"target_ratio={config.target_ratio} of the base's {base_num_layers} layers, that is {num_layers}"
        lower = f"target_ratio, below {num_layers / base_num_layers:.4g}"
    raise ValueError(
        f"Expected a model with more layers than the target, got {said}, for a model that has {num_layers} of "
        f"{base_num_layers}: nothing is left to drop. To trim it further, lower {lower}; to train it as it is, leave "
        "TrimCallback out; to go on with a run, resume its checkpoint."
    )


def refuse_emptied_groups(engine: Engine, model: PreTrainedModel, config: TrimConfig, to_drop: int) -> None:
    """Refuse an optimizer with a parameter group that a drop may empty, if the engine does not allow empty groups.

    Raises:
        ValueError: With the number of layers in the group.
    """
    blocks = find_blocks(base_of(model), config.part).blocks
    layer_of = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    most = to_drop if config.unit == "block" else (to_drop + 1) // 2
    for number, group in enumerate(engine.groups_to_fill()):
        layers = {layer_of.get(id(parameter)) for parameter in group}
        if group and None not in layers and len(layers) <= most:
            raise ValueError(
                f"Expected every parameter group of the optimizer to keep a parameter, got the group {number} with only "
                f"the layers {sorted(str(layer) for layer in layers)}, of a model that loses {to_drop}: DeepSpeed cannot "
                "hold an empty group. Put a parameter that stays into it, merge groups, or use another engine."
            )


def refuse_lost_calibration_set(config: TrimConfig, given_before: bool, calibration_dataset: Any) -> None:
    """Refuse to resume with other calibration examples than the run began with.

    Raises:
        ValueError: With how to pass them.
    """
    if calibration_dataset is None and given_before and takes_calibration_examples(config):
        raise ValueError(
            "Expected the calibration_dataset that this run began with, got none. Give it again: "
            "TrimCallback(config, calibration_dataset=…), with restore_callback_states_from_checkpoint=False, since the "
            "Trainer would make the callback anew, without it; TrimCallback restores its state by itself."
        )


def rehearse_scores(selector: LayerSelector, model: PreTrainedModel) -> None:
    """Score the layers on one batch by each score that the run may use, so that errors occur before the first step.

    Raises:
        ValueError: If a score fails. Nothing has changed.
    """
    config = selector.config
    names = {config.score, config.tie_breaker or config.score}
    if goes_by_loss(config.score) and config.warm_up_importance != "none":  # only these are replaced at chance level
        names.add(config.warm_up_importance)
    for importance in sorted(names):
        try:
            selector.try_score(model, importance)
        except Exception as error:
            in_words = isinstance(error, ValueError) and str(error).startswith("Expected")
            if in_words or should_reduce_batch_size(error):  # out of memory: auto_find_batch_size tries a smaller batch
                raise
            raise ValueError(
                f"Expected a model and batches by which {importance!r} can score layers, got {type(error).__name__}: "
                f"{error}. Use another importance (and warm_up_importance), like 'block_influence' or 'last', or give "
                "examples for it as calibration_dataset. Nothing was changed."
            ) from error
