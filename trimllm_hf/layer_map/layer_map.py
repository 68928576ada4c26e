"""`LayerMap`: which layers of which base model a trimmed model keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..utils import fields_of, is_count, json_at, refuse_not_text, refuse_other_keys, shown
from .base_check import refuse_other_base
from .depth import PARTS, base_name, depth_name, is_of_absent_part, num_hidden_layers, part_config, resolve_part
from .record import DropRecord, check_layers, check_positions, check_sublayers
from .trainer_state import run_in

__all__ = ["DropRecord", "LayerMap", "depth_name", "num_hidden_layers", "part_config", "resolve_part"]

VERSION = 1
MODEL_TYPE = "trimllm"  # in config.json, of a model that lacks sublayers
UNITS = {"block": 1, "sublayer": 2}  # what can be dropped, and how many of it a block has
SUBLAYER_KINDS = ("attention", "mlp")  # of a block, in the order in which sublayers are numbered
MOST_LAYERS = 100_000  # a map from a hostile file must not fill the memory
TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME, which takes seconds to import
ADAPTER_MAP = "trim_map.json"  # beside an adapter, which has no config.json


@dataclass(frozen=True)
class LayerMap:
    """The layers that a model keeps of its base, always in the *base model's* numbering.

    It stands as a plain dict in `config.trim` (hence in config.json) and in trainer_state.json.

    Attributes:
        base_num_layers: Depth of the base model.
        kept_layers: Kept layers (blocks), ascending; position in this tuple is the layer's number in the trimmed model.
        unit: What was dropped: "block", or "sublayer" once an attention or an MLP alone was.
        part: Of an encoder-decoder, the stack that these layers are of: "decoder" or "encoder". The other is whole.
        base_model: Hub id or path of the base model, if known.
        base_revision: Commit of the base model, if known.
        history: The drops, oldest first.
        kept_attention: Of a sublayer map: the kept layers that have their attention. None in a block map: all have.
        kept_mlp: Likewise their MLP. Each kept layer has at least one of the two.

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
    kept_attention: tuple[int, ...] | None = None
    kept_mlp: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not is_count(self.base_num_layers) or self.base_num_layers < 1:
            raise ValueError(f"Expected base_num_layers of at least 1, got {shown(self.base_num_layers)}.")
        if self.base_num_layers > MOST_LAYERS:
            raise ValueError(f"Expected base_num_layers of at most {MOST_LAYERS}, got {shown(self.base_num_layers)}.")
        check_layers("kept_layers", self.kept_layers, self.base_num_layers)
        if self.unit not in tuple(UNITS):  # unhashable values too
            raise ValueError(
                f"Expected unit 'block' or 'sublayer', got {shown(self.unit)}. Install a newer trimllm_hf to read this map."
            )
        if self.unit == "sublayer":
            check_sublayers(self.kept_layers, self.kept_attention, self.kept_mlp, self.base_num_layers)
        elif self.kept_attention is not None or self.kept_mlp is not None:
            raise ValueError("Expected kept_attention and kept_mlp in a map of unit 'sublayer' only, got unit 'block'.")
        if self.part is not None and self.part not in PARTS:
            raise ValueError(f"Expected part 'decoder', 'encoder' or null, got {shown(self.part)}.")
        refuse_not_text(base_model=self.base_model, base_revision=self.base_revision)

    def __str__(self) -> str:
        """The kept layers, and what they lack: `[0, 2, 3], without the mlp of 2`."""
        lacking = [f"the {kind} of {self.kept_layers[position]}" for position, kind in self.missing_sublayers]
        return f"{list(self.kept_layers)}{', without ' if lacking else ''}{' and '.join(lacking)}"

    @property
    def num_layers(self) -> int:
        """Depth of the trimmed model."""
        return len(self.kept_layers)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """The base's layers that are gone, ascending."""
        kept = set(self.kept_layers)
        return tuple(layer for layer in range(self.base_num_layers) if layer not in kept)

    @property
    def sublayers(self) -> tuple[tuple[int, str], ...]:
        """The sublayers that the model has, each as its layer (base numbering) and "attention" or "mlp".

        The order is that of scores and of `drop_layers(unit="sublayer")`: the layers from the first to the last, in each of
        them the attention, then the MLP; those that are gone are left out. A base of n layers has 2n.
        """
        kept = {"attention": self.kept_attention, "mlp": self.kept_mlp}
        of_kind = {kind: set(self.kept_layers if layers is None else layers) for kind, layers in kept.items()}
        return tuple((layer, kind) for layer in self.kept_layers for kind in SUBLAYER_KINDS if layer in of_kind[kind])

    @property
    def has_all_sublayers(self) -> bool:
        """Whether each kept layer has both its sublayers: then stock transformers can load the model."""
        return len(self.sublayers) == 2 * self.num_layers

    @property
    def missing_sublayers(self) -> tuple[tuple[int, str], ...]:
        """What kept layers lack: the layer's position in the model as it is now, and "attention" or "mlp"."""
        sublayers = [(i, layer, kind) for i, layer in enumerate(self.kept_layers) for kind in SUBLAYER_KINDS]
        there = set(self.sublayers)
        return tuple((position, kind) for position, layer, kind in sublayers if (layer, kind) not in there)

    def num_units(self, unit: str) -> int:
        """How many layers the model has, counted in a unit: blocks, or sublayers."""
        return self.num_layers if unit == "block" else len(self.sublayers)

    def keeps_the_same(self, other: LayerMap) -> bool:
        """Whether two maps are of the same layers, and of the same sublayers of them."""
        return (self.base_num_layers, self.sublayers) == (other.base_num_layers, other.sublayers)

    def drop(
        self,
        layers: Sequence[int],
        step: int | None = None,
        importance: str | None = None,
        scores: Sequence[float] | None = None,
        unit: str = "block",
    ) -> LayerMap:
        """The map after `layers` are dropped, given as positions in the model *as it is now*.

        Args:
            layers: Positions among the blocks, or, by sublayers, in `sublayers`; negative ones are refused.
            step: Optimizer step of the drop, for the history.
            importance: Name of the score that chose the layers, for the history.
            scores: Their scores, in the order of `layers`, for the history.
            unit: "block" or "sublayer". A layer whose sublayers are both gone is gone.

        Raises:
            ValueError: If a layer is out of range or named twice, or if none or all would be dropped.
        """
        if unit not in UNITS:
            raise ValueError(f"Expected unit 'block' or 'sublayer', got {unit!r}.")
        layers = list(layers)
        check_positions(layers, self.num_units(unit))
        order = sorted(range(len(layers)), key=lambda i: layers[i])
        positions = [layers[i] for i in order]
        if unit == "block":
            lost = [(self.kept_layers[position], kind) for position in positions for kind in SUBLAYER_KINDS]
        else:
            lost = [self.sublayers[position] for position in positions]
        record = DropRecord(
            dropped=tuple(layer for layer, kind in lost if unit != "block" or kind == SUBLAYER_KINDS[0]),
            step=step,
            importance=importance,
            scores=None if scores is None else tuple(float(scores[i]) for i in order),
            sublayers=None if unit == "block" else tuple(kind for _, kind in lost),
        )
        history = (*self.history, record)
        if unit == self.unit == "block":
            gone = set(record.dropped)
            return replace(self, kept_layers=tuple(x for x in self.kept_layers if x not in gone), history=history)
        attention, mlp = (
            tuple(layer for layer, kept in self.sublayers if kept == kind and (layer, kind) not in lost)
            for kind in SUBLAYER_KINDS
        )
        kept = tuple(sorted({*attention, *mlp}))
        return replace(self, unit="sublayer", kept_layers=kept, kept_attention=attention, kept_mlp=mlp, history=history)

    def positions_to_drop(self, other: LayerMap) -> list[int]:
        """Which positions a model with this map has to drop to keep what `other` keeps, counted in `common_unit`.

        Raises:
            ValueError: If `other` is of another base or depth, or keeps layers that this model no longer has.
        """
        if other.part != self.part:
            raise ValueError(f"Expected a map of the part {other.part!r}, got one of {self.part!r}. Load the base model.")
        if other.base_num_layers != self.base_num_layers:
            raise ValueError(
                f"Expected a base model of {other.base_num_layers} layers, got one of {self.base_num_layers}. Load the "
                f"base model that was trimmed{f' ({other.base_model})' if other.base_model else ''}."
            )
        refuse_other_base(self, other)
        missing = sorted(set(other.sublayers) - set(self.sublayers))
        if missing:
            layers = sorted({layer for layer, _ in missing})
            raise ValueError(
                f"Expected a model that still has the base's layers {layers}, got one that keeps "
                f"{list(self.kept_layers)}{'' if self.has_all_sublayers else ' without some sublayers'}. Load the "
                "full-depth base model instead."
            )
        if self.common_unit(other) == "block":
            kept = set(other.kept_layers)
            return [position for position, layer in enumerate(self.kept_layers) if layer not in kept]
        stay = set(other.sublayers)
        return [position for position, sublayer in enumerate(self.sublayers) if sublayer not in stay]

    def common_unit(self, other: LayerMap) -> str:
        """The unit in which one of two maps can be reached from the other."""
        return "sublayer" if "sublayer" in (self.unit, other.unit) else "block"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        plain["history"] = [record.to_dict() for record in self.history]
        if self.unit == "block":
            del plain["kept_attention"], plain["kept_mlp"]
        return {"version": VERSION, **plain}

    @classmethod
    def from_dict(cls, plain: Any) -> LayerMap:
        """Read a map that `to_dict` wrote; nothing in it is trusted.

        Raises:
            ValueError: If it is damaged, contradicts itself, or was written by a newer version.
        """
        fields = fields_of(plain, "a kept-layer map", VERSION)
        history = fields.pop("history", [])
        refuse_other_keys(fields, {field.name for field in dataclass_fields(cls)} - {"history"}, "base_num_layers")
        for name in ("kept_layers", "kept_attention", "kept_mlp"):
            layers = fields.get(name)
            if isinstance(layers, list | tuple):
                fields[name] = tuple(layers)
            elif name == "kept_layers" or layers is not None:
                raise ValueError(f"Expected {name} to be a list, got {shown(layers)}.")
        if not isinstance(history, list | tuple):
            raise ValueError(f"Expected history to be a list, got {shown(history)}.")
        return cls(history=tuple(DropRecord.from_dict(record) for record in history), **fields)

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
        if plain is None or is_of_absent_part(config, plain):
            base: dict[str, Any] = {"base_model": base_name(config), "base_revision": getattr(config, "_commit_hash", None)}
            return cls(depth, tuple(range(depth)), part=part, **base)
        layer_map = cls.from_dict(plain)
        if part is None:  # a class that has this part of an encoder-decoder alone
            layer_map = replace(layer_map, part=None)
        elif layer_map.part != part:
            raise ValueError(
                f"Expected the part {layer_map.part!r}, of which config.trim is, got {part!r}: a map is of one stack. To "
                "trim the other as well, save this model, load it, and set model.config.trim = None: it is the base then."
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
        in_state = run_in(json_at(folder / TRAINER_STATE)).get("layer_map")
        name = "config.json" if (folder / "config.json").is_file() else ADAPTER_MAP
        in_config = json_at(folder / name, *(["trim"] if name == "config.json" else []))
        of_state, of_config = (None if plain is None else cls.from_dict(plain) for plain in (in_state, in_config))
        if of_state is None or not (folder / name).is_file():
            return of_state or of_config
        of_config = of_config or cls(of_state.base_num_layers, tuple(range(of_state.base_num_layers)))
        if not of_config.keeps_the_same(of_state):
            raise ValueError(
                f"Expected {folder} to agree with itself, got kept layers {of_config} by {name} and {of_state} by "
                f"{TRAINER_STATE}. Use an earlier checkpoint."
            )
        return of_state
