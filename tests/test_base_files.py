"""Which files of a base are the model: those that transformers reads, in its order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimllm_hf import drop_layers, load_kept_layers, write_kept_layers

KEPT, DROPPED = [0, 2, 3, 5], [1, 4]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def stock_then_trimmed(folder: Path, **arguments: Any) -> torch.Tensor:
    """The logits of what transformers reads from a folder, trimmed in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    drop_layers(model, DROPPED)
    return logits(model)


def both_ways(folder: Path, out: Path, **arguments: Any) -> list[torch.Tensor]:
    loaded = load_kept_layers(folder, KEPT, **arguments)
    write_kept_layers(folder, KEPT, out, **arguments)
    return [logits(loaded), logits(AutoModelForCausalLM.from_pretrained(out))]


@pytest.fixture
def old_and_new(tmp_path: Path) -> Path:
    """A folder with the shards and the index of an older save, and one file of a newer one."""
    folder = tmp_path / "base"
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="60KB")
    tiny_model(seed=2).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", folder)
    return folder


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_one_file_goes_before_an_index_that_was_left_over(old_and_new: Path, shards: str, tmp_path: Path) -> None:
    if shards == "gone":
        for path in old_and_new.glob("model-0*"):
            path.unlink()
    expected = stock_then_trimmed(old_and_new)
    for got in both_ways(old_and_new, tmp_path / "out"):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_a_variant_is_honoured(shard: str, tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    tiny_model(seed=2).save_pretrained(tmp_path / "base", variant="fp16", max_shard_size=shard)
    expected = stock_then_trimmed(tmp_path / "base", variant="fp16")
    for got in both_ways(tmp_path / "base", tmp_path / "out", variant="fp16"):
        assert torch.equal(got, expected)
    assert not torch.equal(expected, stock_then_trimmed(tmp_path / "base"))


def test_a_subfolder_is_honoured(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    tiny_model(seed=2).save_pretrained(tmp_path / "base" / "inner")
    (tmp_path / "base" / "inner" / "chat_template.jinja").write_text("inner")
    (tmp_path / "base" / "chat_template.jinja").write_text("outer")
    expected = stock_then_trimmed(tmp_path / "base", subfolder="inner")
    for got in both_ways(tmp_path / "base", tmp_path / "out", subfolder="inner"):
        assert torch.equal(got, expected)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "inner"


def test_a_file_that_the_config_names(old_and_new: Path, tmp_path: Path) -> None:
    (old_and_new / "model.safetensors").rename(old_and_new / "weights.safetensors")
    plain = json.loads((old_and_new / "config.json").read_text())
    (old_and_new / "config.json").write_text(json.dumps({**plain, "transformers_weights": "weights.safetensors"}))
    expected = stock_then_trimmed(old_and_new)
    for got in both_ways(old_and_new, tmp_path / "out"):
        assert torch.equal(got, expected)
    (old_and_new / "config.json").write_text(json.dumps({**plain, "transformers_weights": "../weights.safetensors"}))
    with pytest.raises(ValueError, match="transformers_weights"):
        load_kept_layers(old_and_new, KEPT)


@pytest.mark.parametrize("argument", ["gguf_file", "state_dict", "key_mapping", "config", "from_tf"])
def test_arguments_that_would_choose_other_files_are_refused(argument: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    for call in (load_kept_layers, lambda base, kept, **k: write_kept_layers(base, kept, tmp_path / "out", **k)):
        with pytest.raises(ValueError, match=f"Expected no {argument}="):
            call(tmp_path / "base", KEPT, **{argument: {"x": 1}})
    assert not (tmp_path / "out").exists()


def test_what_a_writer_of_files_cannot_follow_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="got dtype"):
        write_kept_layers(tmp_path / "base", KEPT, tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


class Opened:
    """What a pickle would do to whoever loads it."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/model.safetensors", 7])
def test_an_index_names_only_safetensors_files_beside_it(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    torch.save(Opened(), folder / "pytorch_model.bin")
    index, plain = index_of(folder)
    plain["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="damaged"):
        load_kept_layers(folder, KEPT)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_said(text: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="Expected a weight_map"):
        load_kept_layers(tmp_path, KEPT)


def test_a_shard_that_is_missing_and_one_of_other_weights_are_said(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    _, plain = index_of(tmp_path)
    shard = tmp_path / plain["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    held = load_file(shard)
    shard.unlink()
    with pytest.raises(ValueError, match=f"Expected {shard.name}.*its index names"):
        load_kept_layers(tmp_path, KEPT)
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file({**held, "other": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match="the index is of other files"):
        load_kept_layers(tmp_path, KEPT)


def test_the_headers_metadata_go_along_without_the_dropped_layers(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    packed = {name: json.dumps({"_type": "Int4Tensor", "of": [name]}) for name in tensors if "mlp" in name}
    metadata = {"format": "pt", "tensor_names": json.dumps(sorted(tensors)), "by": "model.layers. by hand", **packed}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    write_kept_layers(folder, KEPT, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        found, names = opened.metadata(), sorted(opened.keys())
    assert json.loads(found["tensor_names"]) == names
    assert found["by"] == "model.layers. by hand"
    of_tensors = {name: json.loads(text)["of"] for name, text in found.items() if "mlp" in name}
    assert of_tensors == {name: [name] for name in names if "mlp" in name}
