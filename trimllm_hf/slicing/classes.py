"""The classes of sliced models, built from the map in the config."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..surgery.custom_models import CustomModel
from ..surgery.remote_code import template
from .channel_shapes import find_channels, shape_channels
from .modules import matrix_sizes, shape_model
from .slice_map import SliceMap
from .wiring import find_wiring

MODEL_TYPE = "trimllm_sliced"  # in config.json


def _depth(plain: dict[str, Any]) -> int:
    return SliceMap.from_dict(plain.get("slicing")).num_layers


def _is_sliced(config: PreTrainedConfig) -> bool:
    found = SliceMap.from_config(config)
    if found is not None and found.what == "hidden" and config.tie_word_embeddings:
        raise ValueError(
            "Expected tie_word_embeddings to be false in the config of a sliced model, got true. The config was changed by "
            "hand or is damaged."
        )
    return found is not None


def _build(model: PreTrainedModel) -> None:
    found = SliceMap.from_config(model.config)
    if found is not None and found.what == "mlp":
        channels = find_channels(model)
        if channels[0].width != found.width:
            raise ValueError(
                f"Expected config.slicing to be of MLPs of the config's {channels[0].width} channels, got {found.width}. "
                "The config was changed by hand or is damaged."
            )
        shape_channels(model, found.widths)
    elif found is not None:
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


def _code(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    found = SliceMap.from_config(model.config)
    assert found is not None
    if found.what == "mlp":
        names = [f"{c.block}.{name}" for c in find_channels(model) for name in (*dict(c.readers), c.writer)]
        return _filled({name: _sizes(model.get_submodule(name)) for name in names}, [], {}, model, found.width)
    stock: Any = type(model)
    wiring = find_wiring(stock.stock_class, model.config)
    sizes: dict[str, Any] = {name: (None, model.get_submodule(name).embedding_dim, False) for name in wiring.embeddings}
    norms, matrices = [wiring.norm], [wiring.head]
    blocks = {}
    for block in wiring.blocks:
        module: Any = model.get_submodule(block.name)
        norms += [f"{block.name}.{norm}" for norm in block.norms]
        for half in (block.attention, block.mlp):
            matrices += [f"{block.name}.{name}" for name in (*half.readers, half.writer)]
        blocks[block.name] = (*reversed(module.shortcut.weight.shape), module.held_back)
    sizes |= {name: _sizes(model.get_submodule(name)) for name in matrices}
    return _filled(sizes, norms, blocks, model, wiring.width)


def _sizes(matrix: Any) -> tuple[int, int, bool]:
    return (*matrix_sizes(matrix), matrix.bias is not None)


def _filled(
    sizes: dict[str, Any], norms: list[str], blocks: dict[str, Any], model: PreTrainedModel, width: int
) -> tuple[str, dict[str, str]]:
    """The code, and the values of its placeholders."""
    values: dict[str, dict[str, Any]] = {
        "SIZES": sizes,
        "NORMS": {name: model.get_submodule(name).eps for name in norms},
        "BLOCKS": blocks,
    }
    lines = {key: "\n".join(f"    {name!r}: {value!r}," for name, value in found.items()) for key, found in values.items()}
    return template(__package__, "sliced.py.txt"), {**lines, "WIDTH": str(width)}


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
    summary="its layers have widths of their own",
    code=_code,
)


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle."""
    return SLICED.class_named(name)
