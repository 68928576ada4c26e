"""`LayerMap`: which layers of which base model a trimmed model keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .depth import PARTS, depth_name, num_hidden_layers, part_config, resolve_part
from .plain import is_count, is_list_of, shown

__all__ = ["DropRecord", "LayerMap", "depth_name", "num_hidden_layers", "part_config", "resolve_part"]

VERSION = 1
MOST_LAYERS = 100_000  # a map from a hostile file must not fill the memory
TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME, which takes seconds to import
ADAPTER_MAP = "trim_map.json"  # beside an adapter, which has no config.json


@dataclass(frozen=True)
class DropRecord:
    """One drop: at which optimizer step, which layers (base numbering), by which importance, with which scores."""

    dropped: tuple[int, ...]
    step: int | None = None
    importance: str | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LayerMap:
    """The layers that a model keeps of its base, always in the *base model's* numbering.

    It stands as a plain dict in `config.trim` (hence in config.json) and in trainer_state.json.

    Attributes:
        base_num_layers: Depth of the base model.
        kept_layers: Kept layers, ascending; position in this tuple is the layer's number in the trimmed model.
        unit: What was dropped, "block".
        part: Of an encoder-decoder, the stack that these layers are of: "decoder" or "encoder". The other is whole.
        base_model: Hub id or path of the base model, if known.
        base_revision: Commit of the base model, if known.
        history: The drops, oldest first.

    Raises:
        ValueError: On construction, if the fields contradict each other or have the wrong types.
    """

    base_num_layers: int
    kept_layers: tuple[int, ...]
    unit: str = "block"
    base_model: str | None = None
    base_revision: str | None = None
    part: str | None = None
    history: tuple[DropRecord, ...] = ()

    def __post_init__(self) -> None:
        if not is_count(self.base_num_layers) or self.base_num_layers < 1:
            raise ValueError(f"Expected base_num_layers of at least 1, got {self.base_num_layers!r}.")
        if self.base_num_layers > MOST_LAYERS:
            raise ValueError(f"Expected base_num_layers of at most {MOST_LAYERS}, got {shown(self.base_num_layers)}.")
        kept = self.kept_layers
        if not isinstance(kept, tuple) or not kept or not all(is_count(layer) for layer in kept):
            raise ValueError(f"Expected kept_layers to be whole numbers, at least one, got {shown(kept)}.")
        if any(a >= b for a, b in pairwise(kept)):
            raise ValueError(f"Expected kept_layers in ascending order without repeats, got {shown(kept)}.")
        if kept[-1] >= self.base_num_layers:
            raise ValueError(
                f"Expected kept_layers from 0 to {self.base_num_layers - 1} (the base has {self.base_num_layers} "
                f"layers), got {shown(kept)}."
            )
        if self.unit != "block":
            raise ValueError(f"Expected unit 'block', got {self.unit!r}. Install a newer trimllm_hf to read this map.")
        if self.part is not None and self.part not in PARTS:
            raise ValueError(f"Expected part 'decoder', 'encoder' or null, got {shown(self.part)}.")
        for name in ("base_model", "base_revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"Expected {name} to be text or null, got {shown(getattr(self, name))}.")

    @property
    def num_layers(self) -> int:
        """Depth of the trimmed model."""
        return len(self.kept_layers)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """The base's layers that are gone, ascending."""
        kept = set(self.kept_layers)
        return tuple(layer for layer in range(self.base_num_layers) if layer not in kept)

    def drop(
        self,
        layers: Sequence[int],
        step: int | None = None,
        importance: str | None = None,
        scores: Sequence[float] | None = None,
    ) -> LayerMap:
        """The map after `layers` are dropped, given as positions in the model *as it is now*.

        Args:
            layers: Positions from 0 to `num_layers - 1`; negative ones are refused.
            step: Optimizer step of the drop, for the history.
            importance: Name of the score that chose the layers, for the history.
            scores: Their scores, in the order of `layers`, for the history.

        Raises:
            ValueError: If a layer is out of range or named twice, or if none or all would be dropped.
        """
        layers = list(layers)
        if not layers:
            raise ValueError(f"Expected at least one layer to drop, got none. The model has {self.num_layers}.")
        wrong = [layer for layer in layers if not is_count(layer) or layer >= self.num_layers]
        if wrong:
            raise ValueError(
                f"Expected layers from 0 to {self.num_layers - 1} (the model has {self.num_layers} now), got {shown(wrong)}."
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"Expected each layer once, got {shown(layers)}.")
        if len(layers) == self.num_layers:
            raise ValueError(f"Expected at least one layer to stay, got all {self.num_layers} to drop.")
        order = sorted(range(len(layers)), key=lambda i: layers[i])
        record = DropRecord(
            dropped=tuple(self.kept_layers[layers[i]] for i in order),
            step=step,
            importance=importance,
            scores=None if scores is None else tuple(float(scores[i]) for i in order),
        )
        gone = set(record.dropped)
        kept = tuple(layer for layer in self.kept_layers if layer not in gone)
        return replace(self, kept_layers=kept, history=(*self.history, record))

    def positions_to_drop(self, other: LayerMap) -> list[int]:
        """Which positions a model with this map has to drop to keep what `other` keeps.

        Raises:
            ValueError: If `other` is of another base depth or keeps layers that this model no longer has.
        """
        if other.part != self.part:
            raise ValueError(
                f"Expected a model whose map is of the part {other.part!r}, got one of the part {self.part!r}. Load the "
                "full-depth base model instead."
            )
        if other.base_num_layers != self.base_num_layers:
            raise ValueError(
                f"Expected a base model of {other.base_num_layers} layers, got one of {self.base_num_layers}. Load the "
                f"base model that was trimmed{f' ({other.base_model})' if other.base_model else ''}."
            )
        missing = sorted(set(other.kept_layers) - set(self.kept_layers))
        if missing:
            raise ValueError(
                f"Expected a model that still has the base's layers {missing}, got one that keeps "
                f"{list(self.kept_layers)}. Load the full-depth base model instead."
            )
        kept = set(other.kept_layers)
        return [position for position, layer in enumerate(self.kept_layers) if layer not in kept]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["kept_layers"] = list(self.kept_layers)
        plain["history"] = [
            {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}
            for record in plain["history"]
        ]
        return {"version": VERSION, **plain}

    @classmethod
    def from_dict(cls, plain: Any) -> LayerMap:
        """Read a map that `to_dict` wrote; nothing in it is trusted.

        Raises:
            ValueError: If it is damaged, contradicts itself, or was written by a newer version.
        """
        if not isinstance(plain, dict):
            raise ValueError(f"Expected a kept-layer map (a dict), got {shown(plain)}.")
        fields = dict(plain)
        version = fields.pop("version", None)
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"Expected a kept-layer map of version {VERSION}, got {shown(version)}. Install a newer trimllm_hf."
            )
        history = fields.pop("history", [])
        kept = fields.pop("kept_layers", None)
        known = {"base_num_layers", "unit", "base_model", "base_revision", "part"}
        if not set(fields) <= known or "base_num_layers" not in fields:
            raise ValueError(f"Expected the keys {sorted(known)}, got {shown(sorted(map(str, fields)))}.")
        if not isinstance(kept, list | tuple):
            raise ValueError(f"Expected kept_layers to be a list, got {shown(kept)}.")
        if not isinstance(history, list | tuple):
            raise ValueError(f"Expected history to be a list, got {shown(history)}.")
        records = tuple(_record_from_dict(record) for record in history)
        return cls(kept_layers=tuple(kept), history=records, **fields)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, part: str | None = None) -> LayerMap:
        """The map of a model by its config; an untrimmed model keeps all its layers.

        Args:
            config: The model's config.
            part: Of an encoder-decoder, the stack: by default the one that was trimmed, else the decoder.

        Raises:
            ValueError: If `config.trim` is damaged, does not fit the config's depth, or is of the other part.
        """
        part = resolve_part(config, part)
        depth = num_hidden_layers(config, part)
        plain = getattr(config, "trim", None)
        if plain is None:
            name = getattr(config, "_name_or_path", "") or None
            revision = getattr(config, "_commit_hash", None)
            return cls(depth, tuple(range(depth)), base_model=name, base_revision=revision, part=part)
        layer_map = cls.from_dict(plain)
        if layer_map.part != part:
            raise ValueError(
                f"Expected the part {layer_map.part!r}, of which config.trim is, got {part!r}. A map is of one stack: of "
                "an encoder-decoder either the decoder or the encoder is trimmed."
            )
        if layer_map.num_layers != depth:
            raise ValueError(
                f"Expected config.trim to keep as many layers as the config's depth of {depth}, got "
                f"{layer_map.num_layers}. The config was changed by hand or is damaged."
            )
        return layer_map

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> LayerMap | None:
        """The map of a Trainer's checkpoint folder, or None where the folder says nothing of it.

        trainer_state.json is asked first: a sharded checkpoint has no config.json. An adapter has a file of ours instead.

        Raises:
            ValueError: If the folder does not exist, or what it says is damaged or contradicts itself.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"Expected a checkpoint folder, got {str(folder)!r}, which is not a folder.")
        of_state = _map_in(folder / TRAINER_STATE, "stateful_callbacks", "TrimCallback", "attributes", "layer_map")
        name = "config.json" if (folder / "config.json").is_file() else ADAPTER_MAP
        of_config = _map_in(folder / "config.json", "trim") if name == "config.json" else _map_in(folder / name)
        if of_state is None or not (folder / name).is_file():
            return of_state or of_config
        kept_by_config = of_config.kept_layers if of_config else tuple(range(of_state.base_num_layers))
        if kept_by_config != of_state.kept_layers:
            raise ValueError(
                f"Expected {folder} to agree with itself, got kept layers {list(kept_by_config)} by {name} and "
                f"{list(of_state.kept_layers)} by {TRAINER_STATE}. Use an earlier checkpoint."
            )
        return of_state


def _map_in(file: Path, *path: str) -> LayerMap | None:
    """The map at `path` in a JSON file, or None where the file or the path does not exist."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {file}, got: {error}. It is half written: use another checkpoint.") from None
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else LayerMap.from_dict(found)


def _record_from_dict(plain: Any) -> DropRecord:
    if not isinstance(plain, dict) or not set(plain) <= {"dropped", "step", "importance", "scores"}:
        raise ValueError(f"Expected a history entry of dropped, step, importance, scores, got {shown(plain)}.")
    dropped, step, scores = plain.get("dropped"), plain.get("step"), plain.get("scores")
    if not is_list_of(dropped, is_count) or not (step is None or is_count(step)):
        raise ValueError(f"Expected whole numbers in a history entry, got {shown(plain)}.")
    if not (scores is None or is_list_of(scores, lambda score: isinstance(score, int | float))):
        raise ValueError(f"Expected numbers as a history entry's scores, got {shown(plain)}.")
    if not isinstance(plain.get("importance"), str | None):
        raise ValueError(f"Expected text as a history entry's importance, got {shown(plain)}.")
    return DropRecord(
        tuple(dropped), step, plain.get("importance"), None if scores is None else tuple(float(s) for s in scores)
    )
