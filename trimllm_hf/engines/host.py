"""transformers' Trainer as a host: the one private method of it that trimming has to step in front of."""

from __future__ import annotations

from typing import Any


class BestModelHost:
    """Calls `before_best_model` before a Trainer loads its best checkpoint into the model.

    `Trainer._load_best_model` has no public seam, and loads a checkpoint of another depth by index.
    """

    state: Any

    def before_best_model(self, checkpoint: str) -> None:
        """Make the model ready for the weights in `checkpoint`."""
        raise NotImplementedError

    def _load_best_model(self) -> None:
        self.before_best_model(self.state.best_model_checkpoint)
        super()._load_best_model()  # type: ignore[misc]  # the Trainer's, by the order of the bases
