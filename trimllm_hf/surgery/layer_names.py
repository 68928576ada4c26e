"""Module names that contain a layer's number (`model.layers.3.mlp`), as in the skip lists of quantization configs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

_REMOVED = object()


class LayerNames:
    """Renumbers the layers in module names, both literal names and regular expressions.

    Args:
        model: The model, with all layers.
        stack: The name of the list of blocks from which some are dropped.
        kept: Positions of the kept blocks, ascending.
    """

    def __init__(self, model: nn.Module, stack: str, kept: Sequence[int]) -> None:
        self.place = {old: new for new, old in enumerate(kept)}
        *self.above, self.last = stack.split(".")
        lists = [name.split(".") for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        self.others = [above for *above, last in lists if last == self.last and above != self.above]
        dot = r"(?:\\?\.)"  # escaped in a regular expression
        self._number = re.compile(rf"(?<!\w)({re.escape(self.last)}{dot})(\d+)(?!\d)")
        self._numbers = re.compile(rf"(?<!\w){re.escape(self.last)}{dot}?[\[(][^\])]*\d")

    def renumber(self, value: Any) -> Any:
        """A value with the names in it renumbered; names of dropped layers are removed from lists and dicts.

        Raises:
            ValueError: If a text names both dropped and kept layers, or its layers cannot be determined.
        """
        found = self._renumbered(value)
        if found is _REMOVED:
            raise ValueError(
                f"Expected names of layers that stay, got {value!r}, all of whose layers would be dropped. Drop others, or "
                "remove it from the config. Nothing was changed."
            )
        return found

    def _renumbered(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            pairs = [(self._renumbered(key), self._renumbered(each)) for key, each in value.items()]
            return {key: each for key, each in pairs if key is not _REMOVED and each is not _REMOVED}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(each for each in map(self._renumbered, value) if each is not _REMOVED)
        return value

    def _text(self, text: str) -> Any:
        if self._numbers.search(text):
            self._refuse(text, "one number for each name")
        ours = [match for match in self._number.finditer(text) if self._is_ours(text, match.start())]
        if not ours:
            return text
        gone = [match for match in ours if int(match[2]) not in self.place]
        if len(gone) == len(ours):
            return _REMOVED
        if gone:
            self._refuse(text, "names of layers that all stay or all go")
        starts = {match.start(): f"{match[1]}{self.place[int(match[2])]}" for match in ours}
        return self._number.sub(lambda match: starts.get(match.start(), match[0]), text)

    def _is_ours(self, text: str, start: int) -> bool:
        """Whether a name refers to the trimmed blocks, by the words before the list's name."""
        before = re.split(r"[|(]|\.\*", text[:start])[-1]
        words = re.findall(r"\w+", before.replace("\\", ""))
        words = words[1:] if words[:1] == ["re"] else words
        ours, others = _may_be(words, self.above), any(_may_be(words, other) for other in self.others)
        if ours == others:
            self._refuse(text, f"a name that says whose {self.last!r} it means")
        return ours

    def _refuse(self, text: str, expected: str) -> None:
        raise ValueError(
            f"Expected {expected} in the config, got {text!r}: the layers' numbers change, and it cannot be told which it "
            "means. Write the names of the modules out. Nothing was changed."
        )


def _may_be(words: Sequence[str], above: Sequence[str]) -> bool:
    """Whether words before a list's name can be its path: the path's end, the path below a wrapper, or in another order."""
    size = min(len(words), len(above))
    return list(words[len(words) - size :]) == list(above[len(above) - size :]) or sorted(words) == sorted(above)
