"""One model type through a drop: is what comes out exactly the model without those blocks?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kinds import Kind
from torch import nn
from transformers import PreTrainedConfig
from zoo_models import tiny_model

from trimllm_hf import drop_layers
from trimllm_hf.surgery.blocks import find_blocks

NEW_TOKENS = 5
NOT_OF_LAYERS = ("architectures", "dtype", "transformers_version", "trim")
VERIFIED = 2  # so many choices of layers are carried through
CHOICES = [(1, 4), (2, 4), (1, 3), (3, 5), (0, 2), (2, 5), (0, 5), (1, 2), (2, 3), (4, 5)]  # of six; the last are adjacent
CHOICES += [(7, 8)]  # of one type that cannot be as shallow


@dataclass(frozen=True)
class Outcome:
    """What became of one model type. `status`: exact, refused, wrong, crash, or unbuilt; `detail` says why."""

    model_type: str
    status: str
    detail: str = ""
    class_name: str = ""


def check_blocks(
    kind: Kind, model_type: str, choices: Sequence[tuple[int, ...]] = CHOICES, verified: int = VERIFIED
) -> Outcome:
    """Drop two blocks, compare with hooks that skip them, save, reload, generate; or be refused without a trace."""
    try:
        model = tiny_model(kind.auto_class, model_type)
        inputs = kind.inputs(model)
        logits_of(model, inputs)
    except Exception as error:
        return Outcome(model_type, "unbuilt", _short(error))
    name = type(model).__name__
    refusals, exact, remarks = [], 0, []
    idle = "too shallow"
    for layers in choices:
        model = tiny_model(kind.auto_class, model_type)
        try:
            blocks = find_blocks(model, kind.part).blocks
        except ValueError as error:
            return Outcome(model_type, "refused", _short(error), name)
        if max(layers) >= len(blocks):
            continue
        try:
            with skipping([blocks[i] for i in layers]):
                expected = logits_of(model, inputs)
            full = logits_of(model, inputs)
        except Exception as error:
            return Outcome(model_type, "crash", f"reference: {_short(error)}", name)
        if torch.allclose(full, expected, atol=1e-4):
            idle = f"{list(layers)}: the blocks change nothing"
            continue  # Mllama's cross-attention without an image
        cached = cache_agrees(model, inputs)
        before = snapshot(model)
        try:
            drop_layers(model, list(layers), part=kind.part)
        except ValueError as error:
            if (trace := difference(before, snapshot(model))) is not None:
                return Outcome(model_type, "wrong", f"refused, but changed {trace}", name)
            refusals.append(f"{list(layers)}: {_short(error)}")
            continue
        except Exception as error:
            return Outcome(model_type, "crash", _short(error), name)
        problem = compare(kind, model, inputs, expected, cached)
        if problem is not None and not survives(kind, model_type, inputs):
            return Outcome(model_type, "unbuilt", "the full model is another one after its own save and reload", name)
        if problem is not None:
            return Outcome(model_type, "wrong", f"{list(layers)}: {problem}", name)
        exact += 1
        if getattr(model, "can_generate", bool)() and not cached:
            remarks.append("the full model's cached generate() could not be compared with its uncached one here")
        if exact == verified:
            break
    if exact:
        remarks += [f"not {refusal}" for refusal in refusals[:1]]
        return Outcome(model_type, "exact", "; ".join(dict.fromkeys(remarks)), name)
    return Outcome(
        model_type, *(("refused", refusals[0]) if refusals else ("unbuilt", f"nothing to compare with: {idle}")), name
    )


def survives(kind: Kind, model_type: str, inputs: Any) -> bool:
    """Whether the full model is the same after a save and a reload, in stock transformers."""
    model = tiny_model(kind.auto_class, model_type)
    try:
        again, _ = reloaded(kind, model)
        return distance(logits_of(again, inputs), logits_of(model, inputs)) <= 1e-4
    except Exception:
        return False


def reloaded(kind: Kind, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A model saved and loaded by stock transformers, and what was said of its keys."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reload_by = kind.auto_class if type(model.config) in kind.auto_class._model_mapping else type(model)
        again, info = reload_by.from_pretrained(folder, output_loading_info=True)
    return again.eval(), info


def compare(kind: Kind, model: nn.Module, inputs: Any, expected: torch.Tensor, cached: bool | None) -> str | None:
    """What is wrong with a trimmed model, or None."""
    try:
        got = logits_of(model, inputs)
        if (error := distance(got, expected)) > 1e-4:
            return f"logits are off by {error:.2g}"
        if cached and not cache_agrees(model, inputs):
            return "cached generate() differs from uncached"
        again, info = reloaded(kind, model)
        if not type(again).__module__.startswith("transformers."):
            return f"it loads as {type(again).__module__}.{type(again).__name__}, which is not stock"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                return f"{what} on reload: {sorted(map(str, info[what]))[:3]}"
        if (error := distance(logits_of(again, inputs), expected)) > 1e-4:
            return f"logits are off by {error:.2g} after a reload"
        if cached and not cache_agrees(again, inputs):
            return "cached generate() differs from uncached after a reload"
        if (field := stale_field(model, again)) is not None:
            return f"a stale config: {field}"
    except Exception as error:
        return _short(error)
    return None


def stale_field(model: nn.Module, again: nn.Module) -> str | None:
    """The first field in which a module's config is not what it would be after a reload, or None."""
    reloaded = dict(again.named_modules())
    seen: set[int] = set()
    for name, module in model.named_modules():
        mine, theirs = getattr(module, "config", None), getattr(reloaded[name], "config", None)
        if not isinstance(mine, PreTrainedConfig) or theirs is None or id(mine) in seen:
            continue
        seen.add(id(mine))
        one, other = mine.to_dict(), theirs.to_dict()
        for field in one.keys() & other.keys():
            if field.startswith("_") or field in NOT_OF_LAYERS or isinstance(one[field], dict):
                continue  # a part's own config is looked at where a module holds it
            if one[field] != other[field]:
                return f"{name or 'model'}.config.{field}: {one[field]} now, {other[field]} after a reload"
    return None


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(2)  # for the few that draw in evaluation mode
    with torch.no_grad():
        return model(**inputs).logits


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value; of unlike shapes, or not numbers: infinite."""
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def cache_agrees(model: nn.Module, inputs: dict[str, torch.Tensor]) -> bool | None:
    """Whether greedy generation gives the same with and without a cache; None where the model cannot generate."""
    if not getattr(model, "can_generate", bool)():
        return None
    out = []
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    for use_cache in (True, False):
        torch.manual_seed(2)
        try:
            with torch.no_grad():
                out.append(
                    model.generate(
                        **inputs,
                        use_cache=use_cache,
                        do_sample=False,
                        max_new_tokens=NEW_TOKENS,
                        min_new_tokens=NEW_TOKENS,
                        output_logits=True,
                        return_dict_in_generate=True,
                    )
                )
        except Exception:
            return None
    if out[0].sequences.shape != out[1].sequences.shape:
        return False
    return bool((out[0].sequences == out[1].sequences).all()) and all(
        distance(a, b) < 1e-3 for a, b in zip(out[0].logits, out[1].logits, strict=True)
    )


@contextmanager
def skipping(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """The independent reference: each block runs, and its hidden states are thrown away for its input."""

    def give_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if hasattr(output, "_replace"):  # Reformer, with its two streams
            return output._replace(attn_output=kwargs["prev_attn_output"], hidden_states=hidden_states)
        if not isinstance(output, tuple | list):
            return hidden_states
        carried = list(output)
        for i, (given, made) in enumerate(zip(args, output, strict=False)):  # Zaya hands on a state of its routers as well
            if (
                isinstance(given, torch.Tensor)
                and isinstance(made, torch.Tensor)
                and given.shape == made.shape
                and given.dim() < 4
            ):
                carried[i] = given
        return type(output)([hidden_states, *carried[1:]])

    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_hook(give_input, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def snapshot(model: nn.Module) -> Any:
    """All that a drop might change: tensors, modules, their plain attributes, and every config."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {}
    configs = {}
    for name, module in model.named_modules():
        plain[name] = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | None)}
        if hasattr(module, "config") and hasattr(module.config, "to_dict"):
            configs[name] = copy.deepcopy(module.config.to_dict())
    return tensors, plain, configs


def difference(before: Any, after: Any) -> str | None:
    """Where two snapshots differ, or None."""
    if before[0].keys() != after[0].keys():
        return "the state's keys"
    for name, tensor in before[0].items():
        if not torch.equal(tensor, after[0][name]):
            return f"the tensor {name}"
    for what in (1, 2):
        for name in before[what].keys() | after[what].keys():
            if before[what].get(name) != after[what].get(name):
                return f"attributes or config of {name or 'the model'}"
    return None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text.startswith("Expected") else f"{type(error).__name__}: {text}"
