"""The best checkpoint of a run that loses layers: the best of those that have as many layers as the model now."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from ..layer_map import LayerMap


def forget_best(state: TrainerState) -> None:
    """Have a Trainer find its best checkpoint anew: the best so far is of another depth, and would be loaded by index."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def forget_other_best(state: TrainerState, layer_map: LayerMap) -> None:
    """Have a Trainer that resumes find its best checkpoint anew, if that has other layers than the model has now."""
    best = state.best_model_checkpoint
    if best is not None and Path(best).is_dir():
        of_best = LayerMap.from_checkpoint(best)
        if of_best is None or not of_best.keeps_the_same(layer_map):
            forget_best(state)
