"""Loading only the kept layers, and writing a trimmed checkpoint without holding the dropped ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from typer.testing import CliRunner

from trimllm_hf import LayerMap, drop_layers, load_kept_layers, write_kept_layers
from trimllm_hf.cli import app
from trimllm_hf.loading import base_files as loading_module

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


@pytest.mark.parametrize("way", ["load", "write", "command"])
def test_no_dropped_tensor_is_read(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base_model().save_pretrained(base, max_shard_size="60KB")
    read: list[int] = []
    original = loading_module._read_into

    def counted(tensor: torch.Tensor, file: object, offset: int, size: int) -> None:
        read.append(size)
        original(tensor, file, offset, size)

    monkeypatch.setattr(loading_module, "_read_into", counted)
    if way == "load":
        loaded = load_kept_layers(base, KEPT)
    elif way == "write":
        write_kept_layers(base, KEPT, out)
    else:
        assert CliRunner().invoke(app, ["trim", "--kept", "0,2-3,5", str(base), str(out)]).exit_code == 0
    read_then = sum(read)
    if way != "load":
        loaded = AutoModelForCausalLM.from_pretrained(out)
    assert read_then == sum(parameter.nbytes for parameter in loaded.parameters())


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


def quantizable() -> PreTrainedModel:
    """Six blocks wide enough for bitsandbytes' blocks of 64 values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bits(number: int) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(**{f"load_in_{number}bit": True})


@pytest.mark.parametrize("number", [8, 4])
def test_quantization_reaches_from_pretrained(tmp_path: Path, number: int) -> None:
    arguments = {"quantization_config": bits(number), "dtype": torch.float32}
    quantizable().save_pretrained(tmp_path / "base")
    loaded = load_kept_layers(tmp_path / "base", KEPT, **arguments)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **arguments)
    for position, layer in enumerate(KEPT):
        mine = loaded.model.layers[position].mlp.up_proj.weight
        of_base = whole.model.layers[layer].mlp.up_proj.weight
        assert mine.dtype == of_base.dtype and mine.dtype != torch.float32
        assert torch.equal(mine.data, of_base.data)
    assert loaded.config.num_hidden_layers == len(KEPT)
    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), logits(loaded))


def test_a_base_that_is_quantized_already(tmp_path: Path) -> None:
    quantizable().save_pretrained(tmp_path / "base")
    arguments = {"quantization_config": bits(4), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", **arguments).save_pretrained(tmp_path / "quantized")
    expected = load_kept_layers(tmp_path / "base", KEPT, **arguments)
    assert torch.equal(logits(load_kept_layers(tmp_path / "quantized", KEPT)), logits(expected))
    write_kept_layers(tmp_path / "quantized", KEPT, tmp_path / "written")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "written")), logits(expected))


def in_hub_cache(model: PreTrainedModel, cache: Path, shard: str) -> Path:
    """A model as the Hub's client keeps it, under the name org/base; its folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--org--base" / "snapshots" / commit
    model.save_pretrained(snapshot, max_shard_size=shard)
    refs = cache / "models--org--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot


def test_of_a_hub_model_only_the_files_with_kept_layers_are_needed(tmp_path: Path) -> None:
    model = base_model()
    snapshot = in_hub_cache(model, tmp_path / "cache", "60KB")
    held = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    of_first = {file for name, file in held.items() if not name.startswith(("model.layers.4.", "model.layers.5."))}
    spare = sorted(set(held.values()) - of_first)
    assert spare
    for file in spare:
        (snapshot / file).unlink()  # offline, nothing could fetch them
    loaded = load_kept_layers("org/base", [0, 1, 2, 3], cache_dir=tmp_path / "cache")
    layer_map = LayerMap.from_config(loaded.config)
    drop_layers(model, [4, 5])
    assert torch.equal(logits(loaded), logits(model))
    assert (layer_map.base_model, layer_map.base_revision) == ("org/base", snapshot.name)
    write_kept_layers("org/base", [0, 1, 2, 3], tmp_path / "written", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "written")), logits(model))
    with pytest.raises(OSError, match="find them in the cached files"):
        load_kept_layers("org/base", KEPT, cache_dir=tmp_path / "cache")
