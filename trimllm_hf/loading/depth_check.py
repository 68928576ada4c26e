"""Refuses weights of another depth, which a Trainer would load by index with only a warning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ..layer_map import ADAPTER_MAP, LayerMap
from ..surgery.adapters import adapters_of, base_of
from ..surgery.blocks import find_blocks


def refuse_other_depths(model: nn.Module, part: str | None = None) -> RemovableHandle:
    """Make `model.load_state_dict` raise on weights with another number of blocks than the model has.

    A Trainer loads checkpoints with strict=False, and PEFT loads adapters in the same way: layers are matched by index and,
    with only a warning, would end up in the wrong places. A copy of the model checks against its own blocks.

    Returns:
        A handle that removes the check.

    Raises:
        ValueError: If the model is in the wrapper that `torch.compile(model)` returns, or has no list of blocks.
    """
    if is_compiled_module(model):
        raise ValueError(
            "Expected a model that is compiled by TrainingArguments(torch_compile=True), or in place (model.compile()), got "
            "torch.compile(model): a Trainer would save its weights under other names. Nothing was changed."
        )
    model = base_of(model)
    find_blocks(model, part)
    # a function of the module alone, so that a copy or an unpickled model does not refer to the first model's blocks
    handle: RemovableHandle = model.register_load_state_dict_pre_hook(partial(_check, part))
    return handle


def _check(part: str | None, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    stack = find_blocks(module, part)
    start = f"{prefix}{stack.name}."
    found = [
        name.removeprefix(start).partition(".")
        for name, tensor in state_dict.items()
        if name.startswith(start)
        and (not isinstance(tensor, torch.Tensor) or tensor.numel())  # the stop tensor in an adapter's file
    ]
    numbers = sorted({int(number) for number, _, _ in found})
    if not numbers:
        return
    depth = len(stack.blocks)
    if adapters_of(module):  # an adapter may be on some of the layers only
        has = {(str(number), rest) for number, block in enumerate(stack.blocks) for rest, _ in block.named_parameters()}
        rests = {rest for _, _, rest in found}
        if {(number, rest) for number, _, rest in found} ^ {pair for pair in has if pair[1] in rests}:
            raise ValueError(wrong_depth(range(depth), numbers))
        return
    rest = {f"{prefix}{name}" for name, _ in module.named_parameters() if not name.startswith(f"{stack.name}.")}
    # one file of a sharded checkpoint holds only some blocks, so only a number beyond the depth is wrong
    whole = rest <= state_dict.keys()
    if numbers[-1] >= depth or (whole and len(numbers) < depth):
        raise ValueError(wrong_depth(range(depth), numbers))
    there = {(int(number), rest.partition(".")[0]) for number, _, rest in found if "." in rest}
    children = [(n, *child) for n, block in enumerate(stack.blocks) for child in block.named_children()]
    here = {(n, name) for n, name, child in children if _holds(child)}
    wrong = (there - here) | (here - there if whole else set())
    if wrong:
        names = sorted(f"{stack.name}.{number}.{name}" for number, name in wrong)
        raise ValueError(
            f"Expected a checkpoint of the sublayers that the model has, got one of others: they differ in {names}. Use "
            "TrimTrainer, or call trim_like(model, checkpoint) on the full-depth model before the Trainer is made."
        )


def _holds(module: nn.Module) -> bool:
    """Whether a module has entries in the state dict."""
    return any(True for _ in module.parameters())


def refuse_another_depth(config: PreTrainedConfig, as_written: Callable[[], PreTrainedConfig] | None = None) -> None:
    """Refuse to load a trimmed model at a depth other than its map's, which would drop layers or add random ones.

    Args:
        config: The config to load it with.
        as_written: Reads the config as it is in the file. If that contradicts its map as well, the file is damaged, which
            is reported where the model is used.

    Raises:
        ValueError: If the config's depth is not that of its map.
    """
    try:
        LayerMap.from_dict(config.trim)
        if as_written is not None:
            LayerMap.from_config(as_written())
    except ValueError:
        return
    try:
        LayerMap.from_config(config)
        return
    except ValueError as error:
        why = error
    raise ValueError(
        f"Expected to load a trimmed model at the depth that it has, got another one: {why} Load it as it is, then "
        "drop_layers(model, […]) takes more layers out, and notes which. Nothing was loaded."
    ) from None


def refuse_adapter_of_other_layers(model: nn.Module, folder: str | Path) -> None:
    """Refuse to load an adapter's weights into a model that keeps other layers than the one it was trained on.

    Raises:
        ValueError: If a local folder's map is not the model's.
    """
    of_adapter = LayerMap.from_checkpoint(folder) if (Path(folder) / ADAPTER_MAP).is_file() else None
    if of_adapter is None:
        return
    of_model = LayerMap.from_config(base_of(model).config, of_adapter.part)
    if _layers(of_model) != _layers(of_adapter):
        raise ValueError(wrong_depth(of_model, of_adapter))


def _layers(layer_map: LayerMap) -> tuple[Any, ...]:
    return layer_map.kept_layers, layer_map.missing_sublayers


def wrong_depth(of_model: Sequence[int] | LayerMap, of_checkpoint: Sequence[int] | LayerMap) -> str:
    """The message for a checkpoint that keeps other layers than the model."""
    (number, layers), (other_number, others) = (
        (each.num_layers, str(each)) if isinstance(each, LayerMap) else (len(each), str(list(each)))
        for each in (of_model, of_checkpoint)
    )
    return (
        f"Expected a checkpoint of the model's {number} layers {layers}, got one with {other_number}: {others}. Use "
        "TrimTrainer, which gives the model the checkpoint's layers on resume, or call trim_like(model, checkpoint) on the "
        "full-depth model before the Trainer is made."
    )
