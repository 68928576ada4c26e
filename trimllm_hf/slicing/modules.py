"""The modules of a sliced model: norms without gain, resized matrices, and one shortcut per block.

A block's own `forward` is unchanged. Its attention reads and writes in the basis of the block's input; the output of its
MLP is in the basis of the next block. So the MLP's output is held back: after the block, the shortcut moves the hidden
states from one basis to the other, and then the output is added. In a parallel block both halves are held back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .slice_map import next_widths
from .wiring import Block, Wiring

SHORTCUT = "shortcut"  # its name in each block
_BLOCKS: dict[type, type[nn.Module]] = {}
DROPOUTS = ("dropout", "hidden_dropout", "residual_dropout")  # attributes for the rate in a block without a dropout module


class SlicedNorm(nn.Module):
    """x / sqrt(sum(x^2) / width + eps): RMSNorm of hidden states that had size `width` before slicing.

    Gains, and a LayerNorm's mean subtraction, are folded into the matrices around it.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / self.width + self.eps)
        return (wide * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


def norm_eps(norm: nn.Module) -> float:
    """A norm's epsilon.

    Raises:
        ValueError: If it has none.
    """
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    raise ValueError(f"Expected a norm with an epsilon, got {type(norm).__name__} without one. Nothing was changed.")


def replace_norm(root: nn.Module, name: str, width: int) -> None:
    """Replace a norm with one without gain."""
    root.set_submodule(name, SlicedNorm(width, norm_eps(root.get_submodule(name))))


def assign(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a module new values, of any size, in a new parameter."""
    path, _, attribute = name.rpartition(".")
    module: Any = root.get_submodule(path)
    held = getattr(module, attribute)
    like = module.weight if held is None else held  # a bias it did not have before
    setattr(module, attribute, nn.Parameter(tensor.to(like.dtype).contiguous(), like.requires_grad))
    if attribute == "weight":
        rename_sizes(module)


def resize(module: Any, inputs: int | None = None, outputs: int | None = None, bias: bool = False) -> None:
    """Shrink a matrix or an embedding table: its first inputs and outputs are kept, in new tensors.

    Args:
        module: A `Linear`, `Conv1D` or `Embedding`.
        inputs: Its new input size; None: unchanged.
        outputs: Its new output size; None: unchanged.
        bias: Whether to give it a bias, of zeros, if it has none.
    """
    weight: torch.Tensor = module.weight.data
    transposed = isinstance(module, Conv1D)  # its weight is (inputs, outputs), as a table's is (rows, outputs)
    if isinstance(module, nn.Embedding):
        weight = weight[:, :outputs]
    else:
        weight = weight[:inputs, :outputs] if transposed else weight[:outputs, :inputs]
    module.weight = _like(module.weight, weight)
    held = getattr(module, "bias", None)
    size = weight.shape[1] if transposed else weight.shape[0]
    if held is not None:
        module.bias = _like(held, held.data[:size])
    elif bias:
        module.bias = _like(module.weight, weight.new_zeros(size))
    rename_sizes(module)


def rename_sizes(module: Any) -> None:
    """Update a module's size attributes to match its weight."""
    rows, columns = module.weight.shape
    if isinstance(module, nn.Embedding):
        module.embedding_dim = columns
    elif isinstance(module, Conv1D):
        module.nx, module.nf = rows, columns
    else:
        module.out_features, module.in_features = rows, columns


def matrix_sizes(module: Any) -> tuple[int, int]:
    """The input and output sizes of a `Linear` or a `Conv1D`."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _like(parameter: Any, data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data.clone(memory_format=torch.contiguous_format), requires_grad=parameter.requires_grad)


def shape_model(model: nn.Module, wiring: Wiring, widths: tuple[int, ...]) -> None:
    """Give a stock model the modules of a sliced one, in place; the values of its weights are meaningless afterwards.

    Args:
        model: The model; on the meta device nothing is allocated.
        wiring: What reads and writes its hidden states.
        widths: The width of each block.
    """
    for name in wiring.embeddings:
        resize(model.get_submodule(name), outputs=widths[0])
    for block, width, after in zip(wiring.blocks, widths, next_widths(widths), strict=True):
        shape_block(model.get_submodule(block.name), block, wiring.width, width, after)
    shape_head(model, wiring, widths[0])


def shape_head(model: nn.Module, wiring: Wiring, width: int) -> None:
    """Give the final norm and the head the shapes of a sliced model."""
    norm, head = model.get_submodule(wiring.norm), model.get_submodule(wiring.head)
    resize(head, inputs=width, bias=getattr(norm, "bias", None) is not None)
    replace_norm(model, wiring.norm, wiring.width)


def shape_block(module: Any, block: Block, full: int, width: int, after: int) -> None:
    """Give a stock block the modules of a sliced one.

    Args:
        module: The block.
        block: What reads and writes the hidden states in it.
        full: Their original width.
        width: Their width in this block.
        after: Their width in the next block.
    """
    shifted = {name: getattr(module.get_submodule(name), "bias", None) is not None for name in block.norms}
    for half, outputs in ((block.attention, after if block.parallel else width), (block.mlp, after)):
        for name in half.readers:
            resize(module.get_submodule(name), inputs=width, bias=shifted[half.norm])
        resize(module.get_submodule(half.writer), outputs=outputs)
    weight = module.get_submodule(block.mlp.writer).weight
    for name in block.norms:
        replace_norm(module, name, full)
    shortcut = nn.Linear(width, after, bias=False, device=weight.device, dtype=weight.dtype)
    module.add_module(SHORTCUT, shortcut)
    connect(module, held_back(block))


def held_back(block: Block) -> dict[str, bool]:
    """The modules whose outputs are held back, by name, and whether dropout is to be applied to each afterwards."""
    halves = [block.attention, block.mlp] if block.parallel else [block.mlp]
    return {_outermost(half.last): half.last == half.writer for half in halves}


def _outermost(name: str) -> str:
    """The module that contains a matrix; safer than the matrix, which an adapter may replace."""
    return name.partition(".")[0]


def connect(module: Any, held: dict[str, bool]) -> None:
    """Make a block hold back the outputs of these modules and add them after its shortcut."""
    rate = next((name for name in DROPOUTS if isinstance(vars(module).get(name), float)), None)
    module.held_back = {name: rate if applied else None for name, applied in held.items()}
    module.__class__ = block_class(type(module))


class SlicedBlockMixin:
    """Added to an architecture's block class to apply the shortcut.

    It overrides `forward` instead of using hooks on the block: gradient checkpointing runs the forward again, and all of
    this must be part of it.
    """

    stock_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: Any = self
        _begin(block)
        return _finish(block, super().forward(*args, **kwargs))  # type: ignore[misc]  # the architecture's

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.stock_class,), vars(self)  # pickle cannot find this dynamically created class by name


def block_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of a sliced block. It keeps the architecture's name, by which transformers and engines identify blocks."""
    if stock not in _BLOCKS:
        names = {"stock_class": stock, "__module__": stock.__module__}
        _BLOCKS[stock] = type(stock.__name__, (SlicedBlockMixin, stock), names)
    return _BLOCKS[stock]


def _empty(stock: type[nn.Module]) -> nn.Module:
    made = block_class(stock)
    return made.__new__(made)


def _begin(block: Any) -> None:
    for name in block.held_back:
        module = block.get_submodule(name)
        if not getattr(module, "holds", False):  # new, or replaced by an adapter
            for inner in module.modules():
                inner.holds = inner is module
            if not any(hook is _hold for hook in module._forward_hooks.values()):
                module.register_forward_hook(_hold)
        module.held = ()


def _hold(module: Any, _: Any, output: Any) -> Any:
    """Store a module's output and return zero instead, which changes nothing when it is added."""
    if not module.holds:
        return None
    result = output[0] if isinstance(output, tuple) else output
    module.held = (*module.held, result)
    zero = result.new_zeros(*result.shape[:-1], 1)
    return (zero, *output[1:]) if isinstance(output, tuple) else zero


def _finish(block: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    result = block.shortcut(hidden)
    for name, rate in block.held_back.items():
        module = block.get_submodule(name)
        for held in module.held:
            dropped = nn.functional.dropout(held, getattr(block, rate), block.training) if rate else held
            result = result + dropped.view(result.shape)
        module.held = ()
    return (result, *output[1:]) if isinstance(output, tuple) else result
