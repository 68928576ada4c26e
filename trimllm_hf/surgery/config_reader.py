"""Reads variants of a config with transformers' own reader."""

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
    """Reads variants of a config with its own class, as loading from config.json would.

    Args:
        config: The config; it is not changed.
        values: Fields to set in it first.

    Attributes:
        plain: The config as a dict.
        now: What is read from it; None if its class cannot read what it writes.
    """

    def __init__(self, config: PreTrainedConfig, values: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.config = config
        self.plain: Plain = {**config.to_dict(), **values}
        self.now = self.read()

    def read(self, more: Mapping[str, Any] = MappingProxyType({}), without: Iterable[str] = ()) -> Plain | None:
        """The config as a dict, read with additional names and without some; None if it cannot be read that way."""
        left_out = set(without)
        plain = copy.deepcopy({**{name: value for name, value in self.plain.items() if name not in left_out}, **more})
        config_class = getattr(type(self.config), "stock_class", type(self.config))
        try:
            with _quiet():
                read: Plain = config_class.from_dict(plain).to_dict()
        except Exception:  # classes refuse values with different exceptions
            return None
        return read

    def says(self, name: str, more: Mapping[str, Any] = MappingProxyType({}), without: Iterable[str] = ()) -> Any:
        """The value read for a name when others replace it."""
        return (self.read(more, [name, *without]) or {}).get(name)

    def changes_nothing(self, more: Mapping[str, Any]) -> bool:
        """Whether additional names leave what is read unchanged."""
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
    """Silence the log: reading a config logs it in full at INFO, and warns about older names."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
