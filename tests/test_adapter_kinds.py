"""Adapters of every kind, added at any time: right after a save and a reload, or refused before anything changes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_surgery import assert_same, snapshot
from tiny import VOCABULARY, tiny_model, tokens
from transformers import LlamaForCausalLM

from trimllm_hf import LayerMap, drop_layers, trim_like

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

TARGETS = ["q_proj", "v_proj"]


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """BOFT sets the compiler's name."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    return folder


def full(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base)


def refused_on_full(base: Path, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(full(base), folder)


# ---- at any time


def after_the_drop(base: Path, folder: Path) -> Any:
    model = full(base)
    drop_layers(model, [1, 3])
    model = peft.get_peft_model(model, lora())
    model.save_pretrained(folder)
    return model


def a_second_one(base: Path, folder: Path) -> Any:
    model = peft.get_peft_model(full(base), lora())
    drop_layers(model, [1, 3])
    model.add_adapter("other", lora())
    model.set_adapter("other")
    model.save_pretrained(folder, selected_adapters=["other"])
    (folder / "other").rename(folder / "moved")
    for file in (folder / "moved").iterdir():
        os.replace(file, folder / file.name)
    return model


def a_weighted_one(base: Path, folder: Path) -> Any:
    model = peft.get_peft_model(full(base), lora())
    drop_layers(model, [1, 3])
    model.add_adapter("other", lora())
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "default_sum", combination_type="linear")
    model.set_adapter("default_sum")
    model.save_pretrained(folder, selected_adapters=["default_sum"])
    for file in (folder / "default_sum").iterdir():
        os.replace(file, folder / file.name)
    return model


def loaded_and_saved_again(base: Path, folder: Path) -> Any:
    after_the_drop(base, folder.with_name("first"))
    model = full(base)
    trim_like(model, folder.with_name("first"))
    model = peft.PeftModel.from_pretrained(model, folder.with_name("first"), is_trainable=True)
    model.save_pretrained(folder)
    return model


def pickled(base: Path, folder: Path) -> Any:
    model = peft.get_peft_model(full(base), lora())
    drop_layers(model, [1, 3])
    model.save_pretrained(folder, safe_serialization=False)
    return model


def added_by_transformers(base: Path, folder: Path) -> Any:
    model = full(base)
    drop_layers(model, [1, 3])
    try:
        model.add_adapter(lora())
    except ValueError as error:
        pytest.skip(f"transformers does not take this PEFT ({peft.__version__}): {error}")
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "make", [after_the_drop, a_second_one, a_weighted_one, loaded_and_saved_again, pickled, added_by_transformers]
)
def test_an_adapter_of_a_trimmed_model_is_saved_with_its_map(make: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(0)
    expected = logits(make(base, folder))
    refused_on_full(base, folder)
    model = full(base)
    assert trim_like(model, folder).kept_layers == (0, 2, 4, 5)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model, folder)), expected, rtol=0, atol=1e-6)


def test_an_adapter_of_a_reloaded_model_is_saved_with_its_map(tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [1, 3])
    model.save_pretrained(tmp_path / "trimmed")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "trimmed")
    peft.get_peft_model(loaded, lora()).save_pretrained(tmp_path / "adapter")
    assert LayerMap.from_checkpoint(tmp_path / "adapter").kept_layers == (0, 2, 4, 5)


@pytest.mark.slow
def test_so_it_is_by_a_process_that_drops_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [1, 3])
    model.save_pretrained(tmp_path / "trimmed")
    code = (
        "import sys, trimllm_hf\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "get_peft_model(model, LoraConfig(target_modules=['q_proj'])).save_pretrained(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "trimmed"), str(tmp_path / "adapter")], check=True)
    assert LayerMap.from_checkpoint(tmp_path / "adapter").kept_layers == (0, 2, 4, 5)


# ---- swapped while the model is in use


def adapter_at(base: Path, folder: Path, seed: int, dropped: list[int]) -> torch.Tensor:
    torch.manual_seed(seed)
    model = peft.get_peft_model(full(base), lora())
    if dropped:
        drop_layers(model, dropped)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("changes", [{}, {"r": 2}], ids=["as it is", "of a smaller rank"])
def test_an_adapter_is_swapped_on_the_right_depth(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    adapter_at(base, tmp_path / "one", 1, [1, 3])
    torch.manual_seed(2)
    other = peft.get_peft_model(full(base), lora(**changes))
    drop_layers(other, [1, 3])
    other.save_pretrained(tmp_path / "two")
    model = full(base)
    trim_like(model, tmp_path / "one")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "one")
    hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default")
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("has", "swapped"), [([], [1, 3]), ([1, 3], [2, 3]), ([1], [1, 3])])
def test_an_adapter_of_other_layers_is_not_swapped(has: list[int], swapped: list[int], base: Path, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict

    adapter_at(base, tmp_path / "one", 1, has)
    adapter_at(base, tmp_path / "two", 2, swapped)
    model = full(base)
    trim_like(model, tmp_path / "one")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "one")
    before = snapshot(model)
    with pytest.raises(ValueError, match="Expected a checkpoint of the model's"):
        hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default")
    if len(has) < len(swapped):  # by weights alone the depth can be told, and not which layers they are
        weights = peft.utils.load_peft_weights(str(tmp_path / "two"), device="cpu")
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in weights.items()}
        config = model.peft_config["default"]
        with pytest.raises(ValueError, match=r"its base was trimmed.*Nothing was changed"):
            hotswap_adapter_from_state_dict(model, named, "default", config)
    assert_same(before, snapshot(model))
    if len(has) < len(swapped):  # without this package PEFT stops as well, if in the middle
        with pytest.raises(RuntimeError, match="size"):
            hotswap_adapter_from_state_dict.__wrapped__(model, named, "default", config)


def mixed(model: Any, *folders: Path) -> Any:
    model.config.use_cache = False  # X-LoRA asks for it
    adapters = {str(number): str(folder) for number, folder in enumerate(folders)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=1, adapters=adapters)
    return peft.get_peft_model(model, config)


def test_adapters_are_mixed_on_the_right_depth(base: Path, tmp_path: Path) -> None:
    """X-LoRA refuses a file with any tensor that it does not know."""
    for number, name in enumerate(("one", "two")):
        adapter_at(base, tmp_path / name, number, [1, 3])
    model = full(base)
    trim_like(model, tmp_path / "one")
    model = mixed(model, tmp_path / "one", tmp_path / "two")
    held = dict(model.named_parameters())
    for number, name in enumerate(("one", "two")):
        saved = peft.utils.load_peft_weights(str(tmp_path / name), device="cpu")
        tensors = {key: tensor for key, tensor in saved.items() if tensor.numel()}
        assert len(tensors) == len(saved) - 1
        for key, tensor in tensors.items():
            layer = key[key.index("layers.") :].replace(".weight", f".{number}.weight")
            (found,) = [parameter for of, parameter in held.items() if of.endswith(layer)]
            assert torch.equal(found, tensor)


def test_adapters_of_other_layers_are_not_mixed(base: Path, tmp_path: Path) -> None:
    adapter_at(base, tmp_path / "one", 1, [1, 3])
    with pytest.raises(ValueError, match="its base was trimmed"):
        mixed(full(base), tmp_path / "one")


# ---- names with a layer's number


@pytest.mark.parametrize("modules", [[], ["q_proj"]], ids=["alone", "beside modules"])
@pytest.mark.parametrize(
    "parameters",
    [["mlp.experts.gate_up_proj"], ["layers.2.mlp.experts.gate_up_proj"], ["layers.4.mlp.experts.down_proj"]],
    ids=["in all layers", "in one", "in another"],
)
def test_an_adapter_of_parameters_follows_them(parameters: list[str], modules: list[str], tmp_path: Path) -> None:
    kind = transformers.MixtralForCausalLM
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    settings = {"target_modules": modules, "target_parameters": parameters, "init_lora_weights": False}
    model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(**settings))
    drop_layers(model, [1, 3])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = kind.from_pretrained(tmp_path / "base")
    trim_like(again, tmp_path / "adapter")
    found = logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes", [{"modules_to_save": ["layers.2.mlp"]}, {"modules_to_save": ["layers.1.mlp", "lm_head"]}]
)
def test_modules_to_save_by_number_are_renumbered(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(full(base), lora(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    reference = copy.deepcopy(model)
    drop_layers(model, [1, 3])
    model.save_pretrained(tmp_path / "adapter")
    again = full(base)
    trim_like(again, tmp_path / "adapter")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), logits(model), rtol=0, atol=1e-6
    )
    assert not torch.allclose(logits(model), logits(reference))


# ---- AdaLoRA


def test_the_masks_of_adalora_follow_their_layers(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 1, "deltaT": 1}
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(full(base), config)

    def train(step: int) -> None:
        model(tokens(), labels=tokens()).loss.backward()
        model.base_model.update_and_allocate(step)

    def masks() -> list[list[bool]]:
        layers = model.get_base_model().model.layers
        return [(layer.self_attn.q_proj.lora_E["default"] != 0).flatten().tolist() for layer in layers]

    for step in range(8):
        train(step)
    before = masks()
    assert before[0] != before[1] or before[2] != before[3]
    drop_layers(model, [1, 3])
    train(8)
    assert masks() == [before[i] for i in (0, 2, 4, 5)]
    assert all(".layers.3" in name for name in model.base_model.rankallocator.ipt if ".5" in name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = full(base)
    trim_like(again, tmp_path / "adapter")
    found = logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- every tuner of PEFT

TUNERS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"target_modules": TARGETS, "total_step": 10},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 3, "task_type": "CAUSAL_LM"},
    "BOFTConfig": {"target_modules": TARGETS, "boft_block_size": 4},
    "BoneConfig": {"target_modules": TARGETS, "r": 8},
    "C3AConfig": {"target_modules": TARGETS, "block_size": 8},
    "DeloraConfig": {"target_modules": TARGETS},
    "FourierFTConfig": {"target_modules": TARGETS, "n_frequency": 10},
    "GraloraConfig": {"target_modules": TARGETS, "r": 4, "gralora_k": 2},
    "HRAConfig": {"target_modules": TARGETS, "r": 4},
    "IA3Config": {"target_modules": TARGETS, "feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoHaConfig": {"target_modules": TARGETS},
    "LoKrConfig": {"target_modules": TARGETS},
    "LoraConfig": {"target_modules": TARGETS},
    "MissConfig": {"target_modules": TARGETS, "r": 8},
    "OFTConfig": {"target_modules": TARGETS, "oft_block_size": 8, "r": 0, "use_cayley_neumann": False},
    "PsoftConfig": {"target_modules": TARGETS, "r": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "RandLoraConfig": {"target_modules": TARGETS, "r": 4},
    "RoadConfig": {"target_modules": TARGETS, "group_size": 8},
    "ShiraConfig": {"target_modules": TARGETS, "r": 4},
    "TrainableTokensConfig": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "VBLoRAConfig": {"target_modules": TARGETS, "vector_length": 4, "num_vectors": 8, "topk": 2},
    "VeraConfig": {"target_modules": TARGETS, "r": 4},
    "WaveFTConfig": {"target_modules": TARGETS, "n_frequency": 10},
}
# They want inputs, texts, other adapters, or a library (scikit-learn) of their own.
LEFT_OUT = {"MultitaskPromptTuningConfig", "PolyConfig", "XLoraConfig", "CartridgeConfig", "AdamssConfig"}
NAMES = sorted({config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()} - LEFT_OUT)
REFUSED = {"AdaptionPromptConfig", "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig"}
CHEAP = ["LoraConfig", "IA3Config", "BOFTConfig", "ShiraConfig", "GraloraConfig", "AdaptionPromptConfig"]


@pytest.mark.parametrize("name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_each_tuner_is_right_after_a_reload_or_refused(name: str, base: Path, tmp_path: Path) -> None:
    kind = getattr(peft, name)
    usual = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    settings = TUNERS.get(name) or {key: value for key, value in usual.items() if key in kind.__dataclass_fields__}
    torch.manual_seed(0)
    model = peft.get_peft_model(full(base), kind(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    before = snapshot(model)
    try:
        drop_layers(model, [1, 3])
    except ValueError as error:
        assert str(error).startswith("Expected an adapter"), error
        assert_same(before, snapshot(model))
        return
    assert name not in REFUSED
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = full(base)
    trim_like(again, tmp_path / "adapter")
    found = logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert found.shape[-1] == VOCABULARY


# ---- the class that AutoPeftModel builds


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_without_a_task_type_autopeft_builds_the_base_that_was_adapted(unit: str, base: Path, tmp_path: Path) -> None:
    model = full(base)
    drop_layers(model, [3], unit=unit)
    model.save_pretrained(tmp_path / "trimmed")
    torch.manual_seed(0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trimmed")
    adapted = peft.get_peft_model(loaded, lora())
    adapted.save_pretrained(tmp_path / "adapter")
    mapping = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping == {"base_model_class": "LlamaForCausalLM", "parent_library": LlamaForCausalLM.__module__}
    again = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(adapted), rtol=0, atol=0)


# ---- the weights that an adapter belongs to


def test_an_adapter_of_a_trimmed_and_trained_model_is_not_for_its_first_base(base: Path, tmp_path: Path) -> None:
    model = full(base)
    drop_layers(model, [1, 3])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)  # trained since
    model.save_pretrained(tmp_path / "trimmed")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "trimmed")
    peft.get_peft_model(loaded, lora()).save_pretrained(tmp_path / "adapter")
    other = full(base)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"Expected the model .*trimmed.*Nothing was changed"):
        trim_like(other, tmp_path / "adapter")
    assert_same(before, snapshot(other))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "trimmed")
    trim_like(again, tmp_path / "adapter")
    peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    refused_on_full(base, tmp_path / "adapter")
