"""Whether two maps may be of one base model: they say its name, and its commit where it came from the Hub."""

from __future__ import annotations

from typing import Protocol

from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")


class NamesBase(Protocol):
    """What says of which base model layers are."""

    @property
    def base_model(self) -> str | None: ...

    @property
    def base_revision(self) -> str | None: ...


def refuse_other_base(of_model: NamesBase, expected: NamesBase) -> None:
    """Refuse a model of another base than the one whose layers are meant.

    Two names from the Hub can be compared. A folder may be the same model under another path: then a warning names both.

    Args:
        of_model: The model's map.
        expected: The map of what is to be loaded into it.

    Raises:
        ValueError: If both bases are from the Hub, and are not the same.
    """
    got, wanted = of_model.base_model, expected.base_model
    if not got or not wanted or got == wanted:
        return
    if of_model.base_revision and expected.base_revision:  # only a model from the Hub has a commit
        raise ValueError(
            f"Expected a model of the base {wanted!r}, whose layers these are, got one of {got!r}. Load {wanted!r} instead."
        )
    logger.warning(
        f"These layers are of the base {wanted!r}, and the model is of {got!r}: make sure that these are the same."
    )
