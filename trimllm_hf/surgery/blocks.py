"""Finds a model's list of blocks, and the attention and the MLP of a block, without a table of architectures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..layer_map import depth_name, num_hidden_layers, part_config, resolve_part


@dataclass(frozen=True)
class BlockStack:
    """A model's blocks and the config that describes them.

    Attributes:
        name: Dotted path of the `ModuleList` in the model, e.g. "model.layers".
        blocks: The `ModuleList` itself.
        config: The config that holds the depth: the model's own, or its text part.
        depth_name: The config's field that counts the blocks, "num_hidden_layers" in most.
        part: For an encoder-decoder, "decoder" or "encoder"; None in a model with one list of blocks.
    """

    name: str
    blocks: nn.ModuleList
    config: PreTrainedConfig
    depth_name: str = "num_hidden_layers"
    part: str | None = None

    def __len__(self) -> int:
        return len(self.blocks)


def find_blocks(model: nn.Module, part: str | None = None) -> BlockStack:
    """Find the list of blocks whose length is the depth in a model's config.

    It is the `ModuleList` of that length whose items are `GradientCheckpointingLayer`s or are named in the model's
    `_no_split_modules`, the two ways in which transformers itself marks a block. A few old architectures have neither;
    there it is the only list of that length whose items are of one class. In a multimodal model it is the list in the
    module that holds the text config; in an encoder-decoder, the one below a module named after the part.

    Args:
        model: A transformers model, unwrapped.
        part: For an encoder-decoder, "decoder" or "encoder"; by default the one that was trimmed, else the decoder.

    Raises:
        ValueError: If the model is not a transformers model, or has no such list or more than one.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"Expected a transformers model (with a config), got {type(model).__name__}. Unwrap it first (a SetFitModel is "
            "in model.model_body), or use drop_prepared_layers for a model that an Accelerator has prepared."
        )
    part = resolve_part(config, part)
    text_config = part_config(config, part)
    depth = num_hidden_layers(config, part)
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and part in (None, _part_of(name))
    ]
    found = [
        (name, module)
        for name, module in lists
        if all(isinstance(b, GradientCheckpointingLayer) or type(b).__name__ in no_split for b in module)
    ] or [(name, module) for name, module in lists if len({type(block) for block in module}) == 1]
    if len(found) > 1:
        found = [(name, module) for name, module in found if _owner_config(model, name) is type(text_config)]
    if len(found) != 1:
        all_lists = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ValueError(
            f"Expected one list of {depth} blocks in {type(model).__name__} (its config's depth), got "
            f"{[name for name, _ in found] or 'none'} among the module lists {all_lists}. This architecture cannot be "
            "trimmed, or its config does not describe it."
        )
    name, blocks = found[0]
    return BlockStack(name, blocks, text_config, depth_name(config, part), part)


def _part_of(name: str) -> str | None:
    """The part of an encoder-decoder that a module belongs to, from the first word in its path that names one."""
    words = (re.fullmatch(r"(?:\w+_)?(encoder|decoder)", word) for word in name.split("."))
    return next((word[1] for word in words if word), None)


def _owner_config(model: nn.Module, name: str) -> type:
    """The config class of the nearest enclosing module of `name` that has a config."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return type(config)
    return type(None)


@dataclass(frozen=True)
class Sublayers:
    """The two sublayers of a block. Each is one module, or several that work together (OPT's `fc1` and `fc2`).

    Attributes:
        attention: The modules that mix tokens (attention, or a state-space or convolution layer in its place), by their
            names in the block, in the order in which the block defines them.
        mlp: The modules that transform each token separately (an MLP or a mixture of experts), by their names in the block.
    """

    attention: dict[str, nn.Module]
    mlp: dict[str, nn.Module]


# By the names of a block's children, which are consistent across transformers' architectures; class names are not.
_ATTENTION = re.compile(r"(self_|linear_)?(attn|attention)|mamba|temporal_block|conv|mlstm_layer")
_MLP = re.compile(r"(shared_)?(mlp|moe|ffn|feed_forward)|block_sparse_moe|mlp_block|intermediate|output|fc[12]")


def find_sublayers(block: nn.Module) -> Sublayers:
    """A block's attention and its MLP, without a table of model names.

    Raises:
        ValueError: If the block does not consist of an attention and an MLP.
    """
    children = [(name, child) for name, child in block.named_children() if any(True for _ in child.parameters())]
    attention = {name: child for name, child in children if _ATTENTION.fullmatch(name)}
    mlp = {name: child for name, child in children if _MLP.fullmatch(name)}
    if not attention or not mlp:
        raise ValueError(
            f"Expected a block made of an attention and an MLP, got {type(block).__name__} with the parts "
            f"{[name for name, _ in children]}. Use unit='block' for this architecture."
        )
    return Sublayers(attention, mlp)
