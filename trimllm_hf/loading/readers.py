"""Which readers take a checkpoint for the model that it is: a verdict for each, from what each derives and what was tried.

A reader that takes the kind of each layer from the config's list reads any trimmed model of a type that it reads. One that
works kinds out from a layer's number is right where the list is what it works out. What nobody tried is not promised: the
types below are those whose bases and trimmed models were read by that reader with the logits of transformers 5, and
`tests/readers` reads them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..layer_map import LayerMap, part_config
from ..surgery.config_reader import ConfigReader
from ..surgery.layer_pattern import KINDS, periods, unlike_default

RIGHT, WRONG, UNTRIED = "right", "not right", "not tried"


@dataclass(frozen=True)
class Verdict:
    """What one reader makes of a checkpoint.

    Attributes:
        reader: Its name, with the version that was tried.
        verdict: "right", "not right", or "not tried".
        reason: Why.
    """

    reader: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Reader:
    """What a reader was tried on, by model types.

    Attributes:
        name: Its name, with the version that was tried.
        by_list: Types whose kinds of layers, if they have several, it takes from the config.
        by_period: Types whose kinds it works out from a layer's number and a period in the config.
        by_number: Types whose kinds it works out from a layer's number alone.
        misread: Types that it reads otherwise than transformers 5, whatever layers are left.
    """

    name: str
    by_list: frozenset[str] = frozenset()
    by_period: frozenset[str] = frozenset()
    by_number: frozenset[str] = frozenset()
    misread: frozenset[str] = frozenset()


TRANSFORMERS_5 = "transformers 5"
READERS = (
    Reader(
        "transformers 4.57",
        by_list=frozenset(),
        by_period=frozenset({"modernbert", "modernbert-decoder"}),
    ),
    Reader("llama.cpp", by_list=frozenset({"llama"}), by_number=frozenset({"gemma3_text"})),
    Reader("mlx-lm 0.32", by_list=frozenset({"llama", "qwen2"}), by_period=frozenset({"gemma3_text", "cohere2"})),
    Reader("CTranslate2 4.8", by_list=frozenset({"llama", "gemma3_text"})),
)


def readers_of(config: PreTrainedConfig) -> tuple[Verdict, ...]:
    """For each reader, whether it takes a checkpoint with this config for the model that transformers 5 takes it for.

    Args:
        config: The config of a trimmed model, or of one that is not.

    Raises:
        ValueError: If its map is damaged.
    """
    layer_map = LayerMap.from_config(config)
    if not layer_map.has_all_sublayers:
        of_stock = Verdict(TRANSFORMERS_5, WRONG, "it does not know blocks that lack a sublayer, and says so")
        return (of_stock, *(Verdict(reader.name, WRONG, of_stock.reason) for reader in READERS))
    holder = part_config(config, layer_map.part)
    found = [Verdict(TRANSFORMERS_5, RIGHT, "the layers that stay were compared when they were chosen")]
    return (*found, *(_verdict(reader, config, holder) for reader in READERS))


def _verdict(reader: Reader, config: PreTrainedConfig, holder: PreTrainedConfig) -> Verdict:
    model_type = holder.model_type if holder.model_type in _all(reader) else config.model_type
    if model_type in reader.misread:
        return Verdict(reader.name, WRONG, f"it reads {model_type} otherwise than transformers 5")
    if model_type in reader.by_list:
        return Verdict(reader.name, RIGHT, "it reads from the config what each layer is")
    for types, what, wrong in (
        (reader.by_period, "a period in the config", _without_period),
        (reader.by_number, "a layer's number", unlike_default),
    ):
        if model_type in types:
            names: Iterable[str] = wrong(holder)
            said = f"it works out what each layer is from {what}, "
            if named := sorted(names):
                return Verdict(reader.name, WRONG, f"{said}which does not give {', '.join(named)}")
            return Verdict(reader.name, RIGHT, f"{said}which gives what the config lists")
    return Verdict(reader.name, UNTRIED, f"not tried with {model_type}")


def _without_period(config: PreTrainedConfig) -> list[str]:
    """The lists of kinds that no period in the written config gives."""
    reader = ConfigReader(config)
    listed = [name for name in KINDS if isinstance((reader.now or {}).get(name), list)]
    words = periods(reader)
    return listed if words and None in words.values() else [] if words else list(unlike_default(config))


def _all(reader: Reader) -> frozenset[str]:
    return reader.by_list | reader.by_period | reader.by_number | reader.misread
