"""One model type through a drop of sublayers: is what is left exactly the model in which those halves add nothing?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from check import Outcome, _short, cache_agrees, difference, distance, logits_of, snapshot
from kinds import Kind
from torch import nn
from zoo_models import tiny_model

import trimllm_hf
from trimllm_hf import LayerMap, drop_layers
from trimllm_hf.surgery.blocks import find_blocks, find_sublayers

assert trimllm_hf  # its import is what makes the Auto classes load what is saved here

Half = tuple[int, str]
# An MLP and an attention of two blocks; the first choice that is allowed. The last is one half, for what is left.
CHOICES: list[list[Half]] = [
    [(1, "mlp"), (3, "attention")],
    [(2, "mlp"), (4, "attention")],
    [(3, "mlp"), (1, "attention")],
    [(3, "mlp"), (2, "attention")],
    [(4, "mlp"), (5, "attention")],
    [(1, "mlp")],
]
# The norms that a half has on the path of the hidden states, so that it is more than a sum that can be zero.
BART = {"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"}
ON_THE_PATH: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bart", "blenderbot-small", "marian", "mvp", "plbart", "trocr"), BART),
    "prophetnet": {"attention": "self_attn_layer_norm", "mlp": "feed_forward_layer_norm"},
    "minimax": {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
}


def check_sublayers(kind: Kind, model_type: str, choices: Sequence[Sequence[Half]] = CHOICES) -> Outcome:
    """Drop two halves, compare with the model in which their weights are zero, save, reload, generate; or be refused."""
    try:
        model = tiny_model(kind.auto_class, model_type)
        inputs = kind.inputs(model)
        full = logits_of(model, inputs)
    except Exception as error:
        return Outcome(model_type, "unbuilt", _short(error))
    name = type(model).__name__
    cached = cache_agrees(model, inputs)
    refusals = []
    for choice in choices:
        model = tiny_model(kind.auto_class, model_type)
        before = snapshot(model)
        try:
            sublayers = LayerMap.from_config(model.config).sublayers
            if max(layer for layer, _ in choice) * 2 >= len(sublayers):
                continue
            drop_layers(model, [sublayers.index(half) for half in choice], unit="sublayer")
        except ValueError as error:
            if (trace := difference(before, snapshot(model))) is not None:
                return Outcome(model_type, "wrong", f"refused, but changed {trace}", name)
            named = " and ".join(f"the {half} of {layer}" for layer, half in choice)
            refusals.append(f"{named}: {_short(error)}")
            continue
        except Exception as error:
            return Outcome(model_type, "crash", f"{type(error).__name__}: {error}", name)
        expected = without(tiny_model(kind.auto_class, model_type), model_type, choice, inputs)
        if distance(full, expected) < 1e-5:
            return Outcome(model_type, "crash", f"{choice}: the halves change nothing", name)
        problem = compare(kind, model, inputs, expected, cached)
        if problem is not None:
            return Outcome(model_type, "wrong", f"{choice}: {problem}", name)
        return Outcome(model_type, "exact", "" if not refusals else f"not for {refusals[0]}", name)
    return Outcome(model_type, "refused", refusals[-1] if refusals else "too shallow", name)


@torch.no_grad()
def without(model: nn.Module, model_type: str, halves: Sequence[Half], inputs: Any) -> torch.Tensor:
    """The reference: the weights of the halves are zero, and norms that they have on the path hand on what they get.

    BERT's modules hold the residual and its norm themselves: they are made to hand on what they got.
    """
    blocks = find_blocks(model).blocks
    with ExitStack() as stack:
        for layer, half in halves:
            block = blocks[layer]
            modules = getattr(find_sublayers(block), half)
            if any(name.endswith("output.LayerNorm") for name, _ in block.named_modules()):
                *_, last = modules.values()
                which = 0 if half == "attention" else 1

                def give(_: nn.Module, args: Any, kwargs: Any, output: Any, which: int = which) -> Any:
                    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][which]
                    return (given, *output[1:]) if isinstance(output, tuple) else given

                stack.callback(last.register_forward_hook(give, with_kwargs=True).remove)
                continue
            for module in modules.values():
                for parameter in module.parameters():
                    parameter.zero_()
            if model_type in ON_THE_PATH:
                norm = block.get_submodule(ON_THE_PATH[model_type][half])
                stack.callback(norm.register_forward_hook(lambda _, args, output: args[0]).remove)
        return logits_of(model, inputs)


def compare(kind: Kind, model: Any, inputs: Any, expected: torch.Tensor, cached: bool | None) -> str | None:
    """What is wrong with a trimmed model, or None."""
    try:
        if (error := distance(logits_of(model, inputs), expected)) > 1e-4:
            return f"logits are off by {error:.2g}"
        if cached and not cache_agrees(model, inputs):
            return "cached generate() differs from uncached"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            by_auto = type(model.config).stock_class in kind.auto_class._model_mapping
            again, info = (kind.auto_class if by_auto else type(model)).from_pretrained(folder, output_loading_info=True)
            to_saved_config = json.loads((Path(folder) / "config.json").read_text())
            for stock in (type(model.config).stock_class, type(model).stock_class):
                try:
                    named = stock.from_pretrained(folder)
                except Exception as error:
                    if "import trimllm_hf" not in str(error):
                        return f"stock {stock.__name__} says only {type(error).__name__}: {error}"
                    continue
                if not isinstance(named, torch.nn.Module):
                    return f"stock {stock.__name__} loads it"
                if (error := distance(logits_of(named.eval(), inputs), expected)) > 1e-4:
                    return f"logits of {stock.__name__}, named outright, are off by {error:.2g}"
        if to_saved_config["model_type"] != "trimllm":
            return f"its model_type is {to_saved_config['model_type']}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                return f"{what} on reload: {sorted(map(str, info[what]))[:3]}"
        again.eval()
        if (error := distance(logits_of(again, inputs), expected)) > 1e-4:
            return f"logits are off by {error:.2g} after a reload"
        if cached and not cache_agrees(again, inputs):
            return "cached generate() differs from uncached after a reload"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
