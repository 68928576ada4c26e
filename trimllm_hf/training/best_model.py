"""The best checkpoint of a run that drops layers: the best among those with as many layers as the model has now."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from ..layer_map import LayerMap


def forget_best(state: TrainerState) -> None:
    """Reset a Trainer's best checkpoint: the best so far has another depth, and would be loaded by index."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def forget_other_best(state: TrainerState, layer_map: LayerMap) -> None:
    """Reset the best checkpoint of a Trainer that resumes, if it has other layers than the model has now."""
    best = state.best_model_checkpoint
    if best is not None and Path(best).is_dir():
        of_best = LayerMap.from_checkpoint(best)
        if of_best is None or not of_best.keeps_the_same(layer_map):
            forget_best(state)
