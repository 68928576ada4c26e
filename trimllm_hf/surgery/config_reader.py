"""transformers' own reader of configs, asked what it makes of a config in other words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

Plain = dict[str, Any]


class ConfigReader:
    """Reads variants of a config by its own class, as a load from config.json would.

    Args:
        config: The config; it stays as it is.
        values: Fields to set in it before.

    Attributes:
        plain: The config as a dict.
        now: What is read from it; None if its class cannot read what it writes.
    """

    def __init__(self, config: PreTrainedConfig, values: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.config = config
        self.plain: Plain = {**config.to_dict(), **values}
        self.now = self.read()

    def read(self, more: Mapping[str, Any] = MappingProxyType({}), without: Iterable[str] = ()) -> Plain | None:
        """The config as a dict, read with other names and without some; None if it cannot be read so."""
        left_out = set(without)
        plain = copy.deepcopy({**{name: value for name, value in self.plain.items() if name not in left_out}, **more})
        config_class = getattr(type(self.config), "stock_class", type(self.config))
        try:
            with _quiet():
                read: Plain = config_class.from_dict(plain).to_dict()
        except Exception:  # each class refuses values in its own way
            return None
        return read

    def says(self, name: str, more: Mapping[str, Any] = MappingProxyType({}), without: Iterable[str] = ()) -> Any:
        """What is read for a name from others that stand in its place."""
        return (self.read(more, [name, *without]) or {}).get(name)

    def changes_nothing(self, more: Mapping[str, Any]) -> bool:
        """Whether further names beside all others leave what is read as it is."""
        read = self.read(more)
        return (
            read is not None
            and self.now is not None
            and all(
                read.get(name) == value for name, value in self.now.items() if not name.startswith("_") and name not in more
            )
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Reading a config tells it whole at INFO, and warns of older words."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
