"""A block-trimmed model elsewhere, as it is: torch.export, ONNX, GGUF's naming, mergekit's passthrough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimllm_hf import drop_layers

KEPT = [0, 2, 3, 5]


class Logits(nn.Module):
    """Token ids to logits: what an export traces."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def trimmed(family: str, folder: Path) -> PreTrainedModel:
    """A trimmed model as its user loads it: saved, and read by stock transformers."""
    model = tiny_model(family)
    drop_layers(model, [1, 4])
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "gemma3_text", "gpt2"))]
)
def test_torch_export_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    model = Logits(trimmed(family, tmp_path))
    with torch.no_grad():
        program = torch.export.export(model, (tokens(),), dynamic_shapes=({1: torch.export.Dim("length", max=32)},))
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for length in (12, 7):
            got = loaded(tokens(length=length))
            torch.testing.assert_close(got, model(tokens(length=length)), rtol=1e-5, atol=1e-5)


def test_onnx_gives_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install '.[exports]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install '.[exports]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[exports]'")
    model = Logits(trimmed("llama", tmp_path))
    with torch.no_grad():
        torch.onnx.export(model, (tokens(),), tmp_path / "model.onnx", input_names=["input_ids"], dynamo=True, verbose=False)
        expected = model(tokens())
    (got,) = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"input_ids": tokens().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def test_gguf_has_a_name_for_every_tensor(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="llama.cpp's gguf is not installed: pip install '.[exports]'")
    trimmed("llama", tmp_path)
    depth = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth)
    mapped = {
        name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in load_file(tmp_path / "model.safetensors")
    }
    assert depth == len(KEPT) and None not in mapped.values()
    of_full_depth = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth + 1)
    assert not any(f"blk.{depth}." in name for name in mapped.values())
    assert of_full_depth.get_name(f"model.layers.{depth}.mlp.up_proj.weight", try_suffixes=(".weight",)) is not None


def test_mergekit_passthrough_gives_the_same_tensors(tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed: pip install '.[peers]'")
    base = tmp_path / "base"
    model = tiny_model("llama")
    model.save_pretrained(base)
    drop_layers(model, [1, 4])
    model.save_pretrained(tmp_path / "ours")
    slices: Any = [{"sources": [{"model": str(base), "layer_range": [k, k + 1]}]} for k in KEPT]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": "float32"}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "theirs")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    theirs = {name: tensor for name, tensor in theirs.items() if name in ours or "rotary" not in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_hidden_layers"] == len(KEPT)
