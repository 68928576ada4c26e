"""`SliceMap`: the width of each layer of a sliced model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..layer_map import MOST_LAYERS, num_hidden_layers, part_config
from ..utils import fields_of, is_count, is_list_of, is_number, refuse_not_text, refuse_other_keys, shown

VERSION = 1
KINDS = {"hidden": "hidden_size", "mlp": "intermediate_size"}  # what is cut -> its name in a config, where there is one
ALLOCATIONS = ("redundancy", "uniform")
MEANS = ("layers", "parameters")
LEAST_WIDTH = 8
MOST_WIDTH = 1_000_000  # a map from a hostile file must not fill the memory


@dataclass(frozen=True)
class SliceMap:
    """The width of each layer of a sliced model.

    It is stored as a plain dict in `config.slicing` (hence in config.json). There the widths are written in the format of
    transformers' own `per_layer_config` for values that differ between layers.

    Attributes:
        width: The width of every layer of the base: its hidden size, or its MLPs' intermediate size.
        widths: The width of each layer of the model. For hidden states: those that its attention and its MLP read; the
            embedding and the head are as wide as the first layer (some architectures assume that both are equal).
        what: "hidden", the hidden states; or "mlp", the MLPs' channels.
        ratio: The requested mean share to cut.
        allocation: "redundancy", or "uniform".
        spread: How strongly shares follow redundancy, from 0 (uniform) to 1.
        mean: Whether the mean share is over "layers" or over the blocks' "parameters".
        redundancy: The layers' block influence, which determined the shares: 1 - cosine of input and output; or None.
        tokens: Number of calibration tokens.
        base_model: Hub id or path of the base model, if known.
        base_revision: Commit of the base model, if known.

    Raises:
        ValueError: On construction, if the fields contradict each other or have the wrong types.
    """

    width: int
    widths: tuple[int, ...]
    what: str = "hidden"
    ratio: float | None = None
    allocation: str = "uniform"
    spread: float = 0.0
    mean: str = "layers"
    redundancy: tuple[float, ...] | None = None
    tokens: int | None = None
    base_model: str | None = None
    base_revision: str | None = None

    def __post_init__(self) -> None:
        if self.what not in KINDS:
            raise ValueError(
                f"Expected what to be one of {list(KINDS)}, got {shown(self.what)}. Install a newer trimllm_hf."
            )
        if not is_count(self.width) or not LEAST_WIDTH <= self.width <= MOST_WIDTH:
            raise ValueError(f"Expected a width from {LEAST_WIDTH} to {MOST_WIDTH}, got {shown(self.width)}.")
        if not isinstance(self.widths, tuple) or not 1 <= len(self.widths) <= MOST_LAYERS:
            raise ValueError(f"Expected the widths of 1 to {MOST_LAYERS} layers, got {shown(self.widths)}.")
        if not all(is_count(width) and LEAST_WIDTH <= width <= self.width for width in self.widths):
            raise ValueError(f"Expected widths from {LEAST_WIDTH} to {self.width}, got {shown(self.widths)}.")
        for name, known in (("allocation", ALLOCATIONS), ("mean", MEANS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {list(known)}, got {shown(getattr(self, name))}.")
        if not (self.ratio is None or _is_share(self.ratio)) or not _is_share(self.spread):
            raise ValueError(f"Expected ratio and spread from 0 to 1, got {shown(self.ratio)} and {shown(self.spread)}.")
        if self.redundancy is not None and not (
            isinstance(self.redundancy, tuple)
            and len(self.redundancy) == len(self.widths)
            and all(map(is_number, self.redundancy))
        ):
            raise ValueError(f"Expected redundancy to be a number a layer, got {shown(self.redundancy)}.")
        if not (self.tokens is None or is_count(self.tokens)):
            raise ValueError(f"Expected tokens to be a whole number or null, got {shown(self.tokens)}.")
        refuse_not_text(base_model=self.base_model, base_revision=self.base_revision)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.widths)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each layer's width that was cut."""
        return tuple(1 - width / self.width for width in self.widths)

    @property
    def mean_share(self) -> float:
        """Their mean over the layers."""
        return sum(self.shares) / len(self.shares)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        key = KINDS[self.what]
        return {
            "version": VERSION,
            "what": self.what,
            key: self.width,
            "per_layer_config": {str(layer): {key: width} for layer, width in enumerate(self.widths)},
            "ratio": self.ratio,
            "allocation": self.allocation,
            "spread": self.spread,
            "mean": self.mean,
            "redundancy": None if self.redundancy is None else list(self.redundancy),
            "tokens": self.tokens,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
        }

    @classmethod
    def from_dict(cls, plain: Any) -> SliceMap:
        """Read a map that `to_dict` wrote; nothing in it is trusted.

        Raises:
            ValueError: If it is damaged, contradicts itself, or was written by a newer version.
        """
        fields = fields_of(plain, "a map of widths", VERSION)
        what = fields.get("what")
        if not isinstance(what, str) or what not in KINDS:
            raise ValueError(f"Expected what to be one of {list(KINDS)}, got {shown(what)}. Install a newer trimllm_hf.")
        key = KINDS[what]
        layers = fields.pop("per_layer_config", None)
        known = {"what", key, "ratio", "allocation", "spread", "mean", "redundancy", "tokens", "base_model", "base_revision"}
        refuse_other_keys(fields, known, key)
        if not isinstance(layers, dict) or len(layers) > MOST_LAYERS:
            raise ValueError(f"Expected per_layer_config to hold an entry a layer, got {shown(layers)}.")
        entries: list[Any] = [layers.get(str(layer)) for layer in range(len(layers))]
        if not all(isinstance(entry, dict) and set(entry) == {key} for entry in entries):
            raise ValueError(f"Expected per_layer_config to hold the {key} of the layers 0, 1, …, got {shown(layers)}.")
        redundancy = fields.get("redundancy")
        if redundancy is not None:
            if not is_list_of(redundancy, is_number):
                raise ValueError(f"Expected redundancy to be a number a layer, got {shown(redundancy)}.")
            fields["redundancy"] = tuple(float(value) for value in redundancy)
        return cls(width=fields.pop(key), widths=tuple(entry[key] for entry in entries), **fields)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> SliceMap | None:
        """The map in a model's config, or None if the model is not sliced.

        Raises:
            ValueError: If `config.slicing` is damaged, or does not fit the config's depth and width.
        """
        plain = getattr(config, "slicing", None)
        if plain is None:
            return None
        found = cls.from_dict(plain)
        depth = num_hidden_layers(config)
        if found.num_layers != depth:
            raise ValueError(
                f"Expected config.slicing to hold the widths of the config's {depth} layers, got {found.num_layers}. The "
                "config was changed by hand or is damaged."
            )
        width = getattr(part_config(config), KINDS[found.what], None)
        if found.what == "hidden" and width != found.width:
            raise ValueError(
                f"Expected config.slicing to be of hidden states of the config's size {shown(width)}, got {found.width}. "
                "The config was changed by hand or is damaged."
            )
        return found


def next_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The width of the hidden states after each layer: that of the next layer; after the last, that of the first."""
    return (*widths[1:], widths[0])


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1
