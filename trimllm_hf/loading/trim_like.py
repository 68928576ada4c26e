"""Trims a base like a checkpoint, and restores a trained model to a checkpoint's depth."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layer_map import TRAINER_STATE, LayerMap
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from ..surgery.custom_models import class_as, update_classes
from ..surgery.drop import drop_layers
from ..surgery.sublayers import custom_of
from ..utils import json_at

_DESCRIBING = (TRAINER_STATE, "config.json", "adapter_config.json")


def trim_like(model: nn.Module, checkpoint: str | Path) -> LayerMap:
    """Trim a model in place to the layers in a checkpoint's kept-layer map.

    Call it before the Trainer is created, to resume a trimmed run with a plain `Trainer` and `TrimCallback`. The kept
    layers retain the model's own weights until the Trainer loads the checkpoint's.

    Args:
        model: The full-depth base model, or one that still has all layers that the checkpoint keeps; not yet wrapped. It
            may have adapters already.
        checkpoint: A checkpoint folder of a run that trimmed, or the folder of a trimmed model or of an adapter for one:
            with the base trimmed this way, `PeftModel.from_pretrained(model, checkpoint)` is the trained model.

    Returns:
        The model's map after the drop. A checkpoint from before the first drop leaves the model as it is.

    Raises:
        ValueError: If the folder does not exist, does not say which layers it holds (Accelerate's `save_state` writes no
            config) or contradicts itself, if the model lacks layers that the checkpoint keeps, or if the checkpoint is an
            adapter that was trained on other weights. The model is left unchanged.
    """
    config = base_of(model).config
    of_checkpoint = LayerMap.from_checkpoint(checkpoint)
    if of_checkpoint is None:
        if not any((Path(checkpoint) / name).is_file() for name in _DESCRIBING):
            raise ValueError(
                f"Expected a folder that says which layers it holds, got {str(checkpoint)!r}, which has none of "
                f"{', '.join(_DESCRIBING)}. After Accelerate's save_state, drop the same layers with drop_layers before "
                "prepare and load_state. Nothing was changed."
            )
        return LayerMap.from_config(config)
    of_model = LayerMap.from_config(config, of_checkpoint.part)
    _refuse_other_weights(config, checkpoint, of_checkpoint)
    positions = of_model.positions_to_drop(of_checkpoint)
    if positions:
        drop_layers(model, positions, of_model.common_unit(of_checkpoint), part=of_checkpoint.part)
        base_of(model).config.trim = of_checkpoint.to_dict()  # a config that was shared is a copy by now
    return of_checkpoint


def _refuse_other_weights(config: PreTrainedConfig, checkpoint: str | Path, layer_map: LayerMap) -> None:
    """Refuse a base for an adapter that was trained on other weights: on a model that was trimmed and then trained further.

    PEFT records the model that was loaded. If that is the base of the map, the model was only trimmed.
    """
    trained_on = json_at(Path(checkpoint) / "adapter_config.json", "base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on or not layer_map.base_model:
        return
    same = {_place(trained_on)} & {_place(layer_map.base_model), _place(getattr(config, "_name_or_path", ""))}
    if not same:
        raise ValueError(
            f"Expected the model {trained_on!r}, on which the adapter was trained, got "
            f"{getattr(config, '_name_or_path', '') or 'one without a name'}. It was trimmed from {layer_map.base_model!r} "
            f"and may have been trained since: load {trained_on!r}, which has these layers already. Nothing was changed."
        )


def _place(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def restore_layers_from(model: PreTrainedModel, checkpoint: str | Path, layer_map: LayerMap | None = None) -> LayerMap:
    """Give a trimmed model the blocks of a deeper checkpoint of the same run, in place, weights included.

    The model and its container of blocks remain the same objects; the blocks are the checkpoint's. Its map is `layer_map`
    or, by default, the one in the checkpoint's config.

    Raises:
        OSError: If the folder holds no model.
    """
    of_checkpoint = LayerMap.from_checkpoint(checkpoint)
    donor_class = class_as(type(model), custom_of(of_checkpoint))
    donor = donor_class.from_pretrained(checkpoint, dtype=model.dtype)
    own = find_blocks(model)
    other = find_blocks(donor, own.part)
    device = next(model.parameters()).device
    blocks = [block.to(device).train(model.training) for block in other.blocks]
    del own.blocks[:]
    own.blocks.extend(blocks)
    donors = dict(donor.named_modules())
    for path, module in model.named_modules():  # some modules have their own config
        theirs = getattr(donors[path], "config", None)
        if isinstance(theirs, PreTrainedConfig):
            for name, value in vars(theirs).items():
                if not name.startswith("_") and not isinstance(value, PreTrainedConfig):
                    setattr(module.config, name, value)
    layer_map = layer_map or LayerMap.from_config(donor.config, own.part)
    model.config.trim = layer_map.to_dict()
    update_classes(model, custom_of(layer_map))
    model.load_state_dict(donor.state_dict())
    return layer_map
