"""The classes of sliced models: what their map says, and what they are built of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..surgery.custom_models import CustomModel
from .modules import shape_model
from .slice_map import SliceMap
from .wiring import find_wiring

MODEL_TYPE = "trimllm_sliced"  # in config.json


def _depth(plain: dict[str, Any]) -> int:
    return SliceMap.from_dict(plain.get("slicing")).num_layers


def _is_sliced(config: PreTrainedConfig) -> bool:
    found = SliceMap.from_config(config)
    if found is not None and config.tie_word_embeddings:
        raise ValueError(
            "Expected tie_word_embeddings to be false in the config of a sliced model, got true. The config was changed by "
            "hand or is damaged."
        )
    return found is not None


def _build(model: PreTrainedModel) -> None:
    found = SliceMap.from_config(model.config)
    if found is not None:
        stock: Any = type(model)
        wiring = find_wiring(stock.stock_class, model.config)
        shape_model(model, wiring, found.widths)


def _refuse_gaps(model: PreTrainedModel, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info[what])
        if wrong:
            raise ValueError(
                f"Expected weights of exactly the widths in config.slicing, got {len(wrong)} {what}: {wrong[:3]}. The "
                "folder is damaged, or its config.json is of another model."
            )


SLICED = CustomModel(
    model_type=MODEL_TYPE,
    prefix="Sliced",
    warning="its layers have widths of their own (see slicing): run `import trimllm_hf` before loading this model",
    module=__name__,
    depth=_depth,
    applies=_is_sliced,
    build=_build,
    check=_refuse_gaps,
    cannot="This architecture cannot be sliced.",
)


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle."""
    return SLICED.class_named(name)
