"""`drop_layers`: the trimmed model is the model without those layers, and what stock transformers loads."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, tiny_model, tokens
from torch import nn
from transformers import PreTrainedModel

from trimllm_hf import LayerMap, drop_layers
from trimllm_hf.surgery import trimmable, verify
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.drop import plan_drop
from trimllm_hf.surgery.from_config import build_from_config

DROPPED, KEPT = [1, 3], (0, 2, 4, 5)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tokens()).logits


@torch.no_grad()
def logits_with_layers_skipped(model: PreTrainedModel, layers: list[int]) -> torch.Tensor:
    """The reference: the full model, in which hooks hand on the input of the layers in place of their output."""
    blocks: nn.ModuleList = model.get_submodule(BLOCKS[model.config.model_type])

    def hand_on(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [blocks[i].register_forward_hook(hand_on, with_kwargs=True) for i in layers]
    result = model(tokens(), use_cache=False).logits if model.config.model_type != "bert" else model(tokens()).logits
    for handle in handles:
        handle.remove()
    return result


BLOCKS = {
    **dict.fromkeys(FAMILIES, "model.layers"),
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_is_found(family: str) -> None:
    model = tiny_model(family)
    stack = find_blocks(model)
    assert stack.name == BLOCKS[family]
    assert stack.blocks is model.get_submodule(BLOCKS[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_is_skipping(family: str) -> None:
    model = tiny_model(family)
    expected = logits_with_layers_skipped(model, DROPPED)
    before = logits(model)
    blocks = find_blocks(model).blocks
    layer_map = drop_layers(model, DROPPED)
    assert layer_map.kept_layers == KEPT
    assert find_blocks(model).blocks is blocks and len(blocks) == 4
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, before)  # the layers did something


RELOAD = """
import json, sys, torch
sys.modules["trimllm_hf"] = None  # an import of the package fails
import transformers
for folder, class_name in json.loads(sys.argv[1]):
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    seen = torch.load(folder + "/seen.pt")
    with torch.no_grad():
        assert torch.equal(model(seen["tokens"]).logits, seen["logits"]), folder
        if hasattr(model, "lm_head") or model.can_generate():
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            cached, uncached = (model.generate(seen["tokens"], use_cache=use, **options) for use in (True, False))
            assert cached.shape[1] == seen["tokens"].shape[1] + 8
            assert torch.equal(cached, uncached), folder
    print("same", folder)
"""


def test_stock_transformers_reloads_every_family(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        model = tiny_model(family)
        drop_layers(model, DROPPED)
        folder = tmp_path / family
        model.save_pretrained(folder)
        torch.save({"tokens": tokens(), "logits": logits(model)}, folder / "seen.pt")
        folders.append((str(folder), type(model).__name__))
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, json.dumps(folders)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == len(FAMILIES)


def test_drops_compose_in_the_base_numbering() -> None:
    model = tiny_model()
    assert drop_layers(model, [1]).kept_layers == (0, 2, 3, 4, 5)
    assert drop_layers(model, [1, 3]).kept_layers == (0, 3, 5)
    layer_map = LayerMap.from_config(model.config)
    assert [record.dropped for record in layer_map.history] == [(1,), (2, 4)]
    once = tiny_model()
    drop_layers(once, [1, 2, 4])
    torch.testing.assert_close(logits(model), logits(once), rtol=0, atol=0)


def test_plans_of_one_model_look_it_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built, found = tiny_model(), [], []
    monkeypatch.setattr(verify, "build_from_config", lambda *args: built.append(args) or build_from_config(*args))
    monkeypatch.setattr(trimmable, "build_from_config", lambda *args: built.append(args) or build_from_config(*args))
    monkeypatch.setattr(trimmable, "find_blocks", lambda *args: found.append(args) or find_blocks(*args))
    target = trimmable.resolve_model(model)
    plans = [plan_drop(target, [layer]) for layer in (1, 2, 3)]
    assert len(built) == 1 + 3  # the model as it is, and one as each plan would leave it
    assert len(found) == 2
    plans[1].apply()
    once = tiny_model()
    drop_layers(once, [2])
    torch.testing.assert_close(logits(model), logits(once), rtol=0, atol=0)


def test_hidden_states_and_gradient_checkpointing_follow() -> None:
    model = tiny_model()
    model(tokens(), output_hidden_states=True)  # installs transformers' own hooks, by layer
    drop_layers(model, DROPPED)
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 5
    model.gradient_checkpointing_enable()
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropped_parameters_are_freed() -> None:
    model = tiny_model()
    refs = [weakref.ref(parameter) for parameter in model.model.layers[2].parameters()]
    drop_layers(model, [2])
    assert [ref() for ref in refs] == [None] * len(refs)


def snapshot(model: PreTrainedModel) -> tuple[dict, dict, list[int]]:
    attributes = [
        {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        for module in model.modules()
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return copy.deepcopy(model.config.to_dict()), state, [attributes]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "at least one layer"),
        ([6], r"layers from 0 to 5 .*got \[6\]"),
        ([-1], r"layers from 0 to 5 .*got \[-1\]"),
        ([1, 1], r"each layer once, got \[1, 1\]"),
        ([0, 1, 2, 3, 4, 5], "at least one layer to stay"),
        ([True], "layers from 0 to 5"),
    ],
)
def test_bad_layers_are_refused_and_nothing_changes(layers: list[int], said: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        drop_layers(model, layers)
    assert_same(before, snapshot(model))


def test_an_architecture_that_depends_on_the_place_is_refused() -> None:
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    config = DiffLlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4)
    model = DiffLlamaForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lambda_init.*Nothing was changed"):
        drop_layers(model, [1])
    assert_same(before, snapshot(model))


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a transformers model"):
        drop_layers(nn.Linear(2, 2), [0])


def test_a_config_that_does_not_describe_the_model_is_refused() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="does not describe it"):
        drop_layers(model, [1])


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0] and before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_a_shared_config_is_not_shared_any_more() -> None:
    model = tiny_model()
    other = type(model)(model.config)
    alone = tiny_model("gpt2")
    config, config_of_alone = model.config, alone.config
    wrapper = nn.Module()
    wrapper.model, wrapper.config = model, model.config
    drop_layers(model, [1, 2])
    drop_layers(alone, [1, 2])
    assert other.config is config and config.num_hidden_layers == 6 and not hasattr(config, "trim")
    assert model.config.num_hidden_layers == 4 and wrapper.config is model.config
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    assert other(tokens()).logits.shape == model(tokens()).logits.shape
    assert alone.config is config_of_alone


def test_a_config_that_a_module_shares_in_any_way_is_found() -> None:
    """As where a module's attributes are no dict that refers to the config (Python 3.13)."""

    class Holder(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            self.config = config

    model = tiny_model()
    config = model.config
    holder = Holder(config)
    drop_layers(model, [1])
    assert holder.config is config and config.num_hidden_layers == 6
    assert model.config is not config and model.config.num_hidden_layers == 5


def hybrid() -> PreTrainedModel:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    types = ["mamba", "moe", "attention", "mlp", "mamba", "moe"]
    config = NemotronHConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, layers_block_type=types, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_shared_expert_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return NemotronHForCausalLM(config).eval()


def test_the_only_layer_with_keys_and_values_stays() -> None:
    model = hybrid()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"attention layers \[2\] to stay.*Nothing was changed"):
        drop_layers(model, [2])  # the other layers are a state space's, experts and an MLP
    assert_same(before, snapshot(model))
    drop_layers(model, [1, 3, 4])
    assert model.generate(tokens(1), max_new_tokens=2, do_sample=False).shape == (1, 14)


def test_a_shared_text_config_is_not_shared_any_more() -> None:
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = tiny_model("gemma3_text").config
    assert isinstance(text, Gemma3TextConfig)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text.to_dict(), vision_config=vision))
    other = Gemma3ForCausalLM(model.config.text_config)
    drop_layers(model, [1, 2])
    assert other.config.num_hidden_layers == 6 and model.config.text_config.num_hidden_layers == 4
    assert model.model.language_model.config is model.config.text_config


def test_pairs_of_numbers_in_a_config_are_no_description_of_layers() -> None:
    model = tiny_model()
    model.config.supported_aspect_ratios = [[1, 1], [2, 1]]
    drop_layers(model, [1])
    assert model.config.supported_aspect_ratios == [[1, 1], [2, 1]]
    repeated = tiny_model()
    repeated.config.attention_types = [[["global"], 10**12]]
    drop_layers(repeated, [1])


def test_blocks_that_are_one_module_keep_their_parameters_until_the_last_goes() -> None:
    model = tiny_model()
    model.model.layers[3] = model.model.layers[2]
    plan = plan_drop(model, [3])
    assert plan.removed_parameters == []
    plan.apply()
    assert len(plan_drop(model, [2]).removed_parameters) == len(list(model.model.layers[2].parameters()))
