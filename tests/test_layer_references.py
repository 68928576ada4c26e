"""Numbers of layers outside the description of the blocks: renumbered with the layers that stay, or refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_surgery import assert_same, snapshot
from tiny import tiny_model, tokens
from torch import nn
from transformers import BitsAndBytesConfig, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from trimllm_hf import drop_layers, load_kept_layers, write_kept_layers
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.forward_reads import fields_in_source
from trimllm_hf.surgery.layer_references import HANDLED_ELSEWHERE, OF_OTHER_PARTS, OF_THE_LAST, OFFSETS

# ---- names of modules, in quantizers' configs

SKIPPED = {
    "fp8": {"modules_to_not_convert": ["lm_head", "model.layers.3.mlp.down_proj", "model.layers.1.mlp"]},
    "compressed-tensors": {
        "ignore": ["re:.*lm_head", "re:model\\.layers\\.3\\.mlp.*", "model.layers.5.self_attn"],
        "config_groups": {"group_0": {"targets": ["model.layers.4.mlp.up_proj"]}},
    },
    "gptq": {
        "dynamic": {"-:model\\.layers\\.3\\.mlp.*": {}, "+:.*\\.layers\\.5\\..*": {"bits": 8}, "-:.*layers\\.1\\..*": {}}
    },
}
AFTER = {  # the layers 1 and 2 are dropped
    "fp8": {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"]},
    "compressed-tensors": {
        "ignore": ["re:.*lm_head", "re:model\\.layers\\.1\\.mlp.*", "model.layers.3.self_attn"],
        "config_groups": {"group_0": {"targets": ["model.layers.2.mlp.up_proj"]}},
    },
    "gptq": {"dynamic": {"-:model\\.layers\\.1\\.mlp.*": {}, "+:.*\\.layers\\.3\\..*": {"bits": 8}}},
}


@pytest.mark.parametrize("method", SKIPPED)
def test_names_in_a_quantization_config_are_renumbered(method: str) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": method, **copy.deepcopy(SKIPPED[method])}
    drop_layers(model, [1, 2])
    assert model.config.quantization_config == {"quant_method": method, **AFTER[method]}


def test_a_quantization_config_that_is_an_object_is_renumbered_in_place() -> None:
    model = tiny_model()
    skipped = ["lm_head", "model.layers.3.mlp", "model.layers.2"]
    config = model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    drop_layers(model, [1, 2])
    assert model.config.quantization_config is config
    assert config.llm_int8_skip_modules == ["lm_head", "model.layers.1.mlp"]


@pytest.mark.parametrize("name", ["re:model.layers.[0-3].mlp", "-:model\\.layers\\.(1|4)\\..*", "layers.1.mlp|layers.4.mlp"])
def test_names_of_which_some_layers_cannot_be_told_are_refused(name: str) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "fp8", "ignore": [name]}
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}.*Nothing was changed"):
        drop_layers(model, [1])
    assert_same(before, snapshot(model))


def test_only_the_text_layers_names_are_renumbered() -> None:
    text = tiny_model("gemma3_text").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    of_vision = next(name for name, _ in model.named_modules() if "vision" in name and name.endswith("layers.3.mlp"))
    names = [of_vision, "language_model.model.layers.3.mlp", f"{find_blocks(model).name}.4.self_attn"]
    model.config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": names}
    drop_layers(model, [1, 2])
    found = model.config.quantization_config["modules_to_not_convert"]
    assert found == [of_vision, "language_model.model.layers.1.mlp", f"{find_blocks(model).name}.2.self_attn"]


# ---- numbers that a head reads

VISION = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28}


def dpt(indices: list[int]) -> PreTrainedModel:
    config = transformers.DPTConfig(
        **{**VISION, "image_size": 32}, patch_size=8, backbone_out_indices=indices, neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5], initializer_range=0.1,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def beit(kind: str, indices: list[int]) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        **VISION,
        patch_size=7,
        out_indices=indices,
        num_labels=3,
        use_auxiliary_head=False,
        initializer_range=0.1,
        drop_path_rate=0.0,
    )
    return getattr(transformers, f"{kind}ForSemanticSegmentation")(config)


def seggpt(indices: list[int]) -> PreTrainedModel:
    config = transformers.SegGptConfig(
        **{**VISION, "image_size": [56, 28]}, patch_size=7, intermediate_hidden_state_indices=indices, merge_index=1,
        decoder_hidden_size=8, pretrain_image_size=28, mlp_dim=64, initializer_range=0.1, drop_path_rate=0.0,
    )  # fmt: skip
    return transformers.SegGptForImageSegmentation(config)


def backbone(indices: list[int]) -> PreTrainedModel:
    return transformers.Dinov2Backbone(transformers.Dinov2Config(**VISION, patch_size=14, out_indices=indices))


def result(model: PreTrainedModel) -> torch.Tensor:
    size = 32 if model.config.model_type == "dpt" else 28
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    more = {"prompt_pixel_values": pixels + 1, "prompt_masks": pixels - 1} if model.config.model_type == "seggpt" else {}
    with torch.no_grad():
        found = model.eval()(pixels, **more)
    first: Any = found[0]
    return torch.cat([each.flatten() for each in first]) if isinstance(first, tuple | list) else first


def skipped(model: PreTrainedModel, layers: list[int]) -> torch.Tensor:
    """The result of the full model when the layers return their input."""

    def skip(block: nn.Module) -> Any:
        forward = block.forward

        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden, *args, **kwargs)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run  # not a hook, behind which transformers' own would have seen the output

    blocks = [find_blocks(model).blocks[i] for i in layers]
    for block in blocks:
        block.forward = skip(block)
    found = result(model)
    for block in blocks:
        del block.forward
    return found


READ = [
    (lambda: dpt([1, 2, 3, 5]), "backbone_out_indices", [0], [0, 1, 2, 4]),
    (lambda: dpt([0, 2, 3, 4]), "backbone_out_indices", [1], [0, 1, 2, 3]),
    (lambda: beit("Beit", [1, 2, 5, 6]), "out_indices", [2], [1, 2, 4, 5]),
    (lambda: beit("Data2VecVision", [2, 3, 5, 6]), "out_indices", [2], [2, 3, 4, 5]),
    (lambda: seggpt([2, 3, 4, 5]), "intermediate_hidden_state_indices", [1], [1, 2, 3, 4]),
    (lambda: backbone([2, 6]), "out_indices", [1, 3], [1, 4]),
]


@pytest.mark.parametrize(("make", "field", "layers", "after"), READ)
def test_numbers_that_forward_reads_follow_their_layers(
    make: Any, field: str, layers: list[int], after: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    expected, full = skipped(model, layers), result(model)
    drop_layers(model, layers)
    assert getattr(model.config, field) == after
    torch.testing.assert_close(result(model), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, full, rtol=0, atol=1e-3 * float(full.abs().max()))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(result(type(model).from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5)


def test_two_numbers_of_one_layer_are_refused() -> None:
    model = dpt([1, 2, 3, 5])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got backbone_out_indices=\[1, 2, 3, 5\].*Nothing was changed"):
        drop_layers(model, [2])  # the outputs of the blocks 1 and 2 would be one
    assert_same(before, snapshot(model))


def test_what_transformers_indexes_layers_by_is_known() -> None:
    """A field that is new here: find out how it counts, and write it into one of the tables."""
    root = Path(transformers.__file__).parent / "models"
    found = {field for file in root.glob("*/modeling_*.py") for field in fields_in_source(file.read_text(encoding="utf-8"))}
    assert found >= {"backbone_out_indices", "intermediate_hidden_state_indices", "out_indices", "extract_layers"}
    known = {*OFFSETS, *OF_THE_LAST, *HANDLED_ELSEWHERE, *OF_OTHER_PARTS}
    assert not found - known, sorted(found - known)


# ---- what forward reads of code that is not transformers' own


class NumberedBlock(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block with a number, that `forward` may compute with."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.n = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states / (self.n + 1), *args, **kwargs)


class NumberedModel(transformers.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([NumberedBlock(config, i) for i in range(config.num_hidden_layers)])


class EarlyModel(transformers.LlamaForCausalLM):
    """Reads the hidden states of a layer that its config names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs, output_hidden_states=True)
        outputs.logits = self.lm_head(outputs.hidden_states[self.config.exit_at])
        return outputs


def test_a_number_that_forward_computes_with_is_refused() -> None:
    model = NumberedModel(tiny_model().config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.n.*Nothing was changed"):
        drop_layers(model, [1])
    assert_same(before, snapshot(model))
    drop_layers(model, [5])  # no number changes


def test_an_unknown_number_of_a_layer_is_refused_where_it_would_mean_another() -> None:
    config = tiny_model().config
    config.exit_at = 3
    model = EarlyModel(config).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got exit_at=3 .*Nothing was changed"):
        drop_layers(model, [1])
    assert_same(before, snapshot(model))
    expected = model(tokens()).logits
    drop_layers(model, [4, 5])
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=0)


# ---- the generation config, and layers behind the blocks


def test_an_early_exit_follows_its_layers() -> None:
    model = tiny_model()
    model.generation_config.assistant_early_exit = 4
    drop_layers(model, [1, 5])
    assert model.generation_config.assistant_early_exit == 3
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"assistant_early_exit=3.*Nothing was changed"):
        drop_layers(model, [0, 1, 2])
    assert_same(before, snapshot(model))


def test_an_early_exit_follows_its_layers_by_files(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.assistant_early_exit = 4
    model.save_pretrained(tmp_path / "base")
    write_kept_layers(tmp_path / "base", [0, 2, 3, 4], tmp_path / "trimmed")
    for trimmed in (
        load_kept_layers(tmp_path / "base", [0, 2, 3, 4]),
        type(model).from_pretrained(tmp_path / "trimmed"),
    ):
        assert trimmed.generation_config.assistant_early_exit == 3


@pytest.mark.parametrize("auto_class", [transformers.AutoModel, transformers.AutoModelForSequenceClassification])
def test_an_early_exit_follows_where_the_class_cannot_generate(auto_class: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.assistant_early_exit = 4
    model.save_pretrained(tmp_path / "base")
    write_kept_layers(tmp_path / "base", [0, 2, 3, 4], tmp_path / "trimmed", auto_class=auto_class)
    assert json.loads((tmp_path / "trimmed" / "generation_config.json").read_text())["assistant_early_exit"] == 3


def test_an_early_exit_of_which_no_layer_would_stay_is_refused_by_files(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.assistant_early_exit = 2
    model.save_pretrained(tmp_path / "base")
    for load in (load_kept_layers, lambda *given: write_kept_layers(*given, tmp_path / "trimmed")):
        with pytest.raises(ValueError, match="layers before assistant_early_exit=2"):
            load(tmp_path / "base", [2, 3, 4, 5])
    assert not (tmp_path / "trimmed").exists()


def with_layer_behind() -> PreTrainedModel:
    config = transformers.Glm4MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        num_nextn_predict_layers=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Glm4MoeForCausalLM(config).eval()


def test_a_trimmed_config_counts_no_layers_that_are_not_in_its_files(tmp_path: Path) -> None:
    model = with_layer_behind()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.5.")}
    behind = {name.replace("layers.5.", "layers.6."): tensor.clone() for name, tensor in last.items()}
    save_file({**tensors, **behind}, file, metadata={"format": "pt"})
    write_kept_layers(tmp_path / "base", [0, 1, 3, 4, 5], tmp_path / "trimmed")
    drop_layers(model, [2])
    assert model.config.num_nextn_predict_layers == 0
    again = type(model).from_pretrained(tmp_path / "trimmed")
    assert again.config.num_nextn_predict_layers == 0
    assert (
        max(int(name.split(".")[2]) for name in load_file(tmp_path / "trimmed" / "model.safetensors") if "layers" in name)
        == 4
    )
    with torch.no_grad():
        torch.testing.assert_close(again(tokens() % 64).logits, model(tokens() % 64).logits, rtol=0, atol=0)
