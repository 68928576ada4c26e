"""A plugin for Axolotl: `plugins: [trimllm_hf.training.axolotl.TrimPlugin]`; the section `trim` holds the settings."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .callback import TrimCallback
from .config import TrimConfig


class TrimArgs(BaseModel):
    """The additional section in Axolotl's config."""

    trim: dict[str, Any] | None = None


class TrimPlugin(BasePlugin):
    """Gives Axolotl's Trainer a `TrimCallback`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{TrimArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the settings before the model is loaded.

        Raises:
            ValueError: If the section is missing, or its values are invalid.
            TypeError: If it names a setting that does not exist.
        """
        settings(cfg)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [TrimCallback(settings(cfg))]


def settings(cfg: Any) -> TrimConfig:
    """The settings in Axolotl's config."""
    given = cfg["trim"] if "trim" in cfg else None
    if not given:
        raise ValueError("Expected a section trim in the config, e.g. `trim: {target_ratio: 0.5}`, got none.")
    return TrimConfig(**given)
