"""Loading only the kept layers, and writing a trimmed checkpoint without holding the dropped ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from trimllm_hf import LayerMap, drop_layers, load_kept_layers, write_kept_layers
from trimllm_hf import loading as loading_module

KEPT = [0, 2, 3, 5]
IDS = torch.arange(5, 20)[None]


def base_model(kind: str = "llama") -> PreTrainedModel:
    """Six blocks; Mixtral's file names its experts one by one, its model holds them in one tensor."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=kind == "tied", **sizes)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_loaded_and_written_equal_drop_layers(tmp_path: Path, kind: str, shard: str) -> None:
    model = base_model(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    assert (tmp_path / "base" / "model.safetensors").exists() == (shard == "1GB")
    loaded = load_kept_layers(tmp_path / "base", KEPT)
    layer_map = write_kept_layers(tmp_path / "base", KEPT, tmp_path / "trimmed")
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path / "trimmed", output_loading_info=True)
    drop_layers(model, [1, 4])
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(written), logits(model))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert LayerMap.from_config(loaded.config).kept_layers == layer_map.kept_layers == tuple(KEPT)


def test_no_dropped_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model()
    model.save_pretrained(tmp_path)
    read: list[int] = []
    original = loading_module._read_into

    def counted(tensor: torch.Tensor, file: object, offset: int, size: int) -> None:
        read.append(size)
        original(tensor, file, offset, size)

    monkeypatch.setattr(loading_module, "_read_into", counted)
    loaded = load_kept_layers(tmp_path, KEPT)
    assert sum(read) == sum(parameter.nbytes for parameter in loaded.parameters())


def test_dtype_and_device_map_reach_from_pretrained(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    loaded = load_kept_layers(tmp_path, KEPT, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.device.type == "cpu"


def test_another_head_by_auto_class(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    loaded = load_kept_layers(tmp_path, KEPT, AutoModelForSequenceClassification)
    assert type(loaded).__name__ == "LlamaForSequenceClassification"
    assert len(loaded.model.layers) == len(KEPT)


def test_a_written_file_keeps_the_bytes(tmp_path: Path) -> None:
    model = base_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    write_kept_layers(tmp_path / "base", KEPT, tmp_path / "trimmed")
    base, trimmed = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "trimmed"))
    for name, tensor in trimmed.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(KEPT[int(parts[2])])
        assert torch.equal(tensor, base[".".join(parts)])


@pytest.mark.parametrize("kept", [[], [0, 0], [2, 1], [0, 6], [-1, 2], [True, 2], ["a"]])
def test_wrong_layers_are_refused(tmp_path: Path, kept: list[int]) -> None:
    base_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="Expected kept_layers"):
        load_kept_layers(tmp_path / "base", kept)
    with pytest.raises(ValueError, match="Expected kept_layers"):
        write_kept_layers(tmp_path / "base", kept, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="new or empty folder"):
        write_kept_layers(tmp_path, KEPT, tmp_path)


def test_pickled_weights_only_on_request(tmp_path: Path) -> None:
    model = base_model()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights.*use_safetensors=False"):
        load_kept_layers(tmp_path, KEPT)
    loaded = load_kept_layers(tmp_path, KEPT, use_safetensors=False)
    drop_layers(model, [1, 4])
    assert torch.equal(logits(loaded), logits(model))


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert len(list(opened.keys())) > 6
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    del header["model.layers.3.mlp.up_proj.weight"]
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_kept_layers(tmp_path, KEPT)
    file.unlink()
    with pytest.raises(ValueError, match=r"Expected model.safetensors or"):
        load_kept_layers(tmp_path, KEPT)
