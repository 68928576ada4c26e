"""What a checkpoint's trainer_state.json says of the run that trimmed the model."""

from __future__ import annotations

from typing import Any


def run_in(state: Any) -> dict[str, Any]:
    """What `TrimCallback`, or a subclass of it, noted of its run; empty where the checkpoint's Trainer had none.

    Args:
        state: The JSON of trainer_state.json; it may be of anybody.
    """
    callbacks = state.get("stateful_callbacks") if isinstance(state, dict) else None
    for saved in callbacks.values() if isinstance(callbacks, dict) else ():
        for each in saved if isinstance(saved, list) else [saved]:  # a Trainer may hold several of a class
            attributes = each.get("attributes") if isinstance(each, dict) else None
            if isinstance(attributes, dict):
                run = attributes.get("saved_run", attributes)  # in older checkpoints they lay side by side
                if isinstance(run, dict) and "layer_map" in run:
                    return run
    return {}
