"""`trimllm export`: what it refuses, what it keeps, what it says; with a runtime that is a file of this folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_texts
from typer.testing import CliRunner

from trimllm_hf import drop_layers
from trimllm_hf.cli import app
from trimllm_hf.publish.exports import export, export_model
from trimllm_hf.publish.exports.comparison import NEW_TOKENS, Reference, compare, prompts_for
from trimllm_hf.publish.exports.formats import FORMATS, Format
from trimllm_hf.publish.exports.tool import Tool
from trimllm_hf.slicing.slice_model import slice_model

FAKE = Format(tool="fake_runtime", runtime="Fake", reader=None, packages={"numpy": "numpy"}, quantized=("int8",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trimmed Llama, and what a runtime that reads it rightly answers, off by `error`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(export, "FORMATS", {**FORMATS, "fake": FAKE})
    model = tiny_model()
    drop_layers(model, [1, 4])
    model.save_pretrained(tmp_path / "model")
    answers_of(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def answers_of(folder: Path, error: float = 0.0) -> None:
    reference = Reference(folder)
    known = {}
    for prompt in prompts_for(folder, reference.model.config):
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(reference.model(torch.tensor([ids])).logits[0, -1].argmax()))
        tokens = ids[len(prompt) :]
        logits = reference.logits(prompt, tokens)
        logits[3, 5] += error
        known |= {f"tokens{len(prompt)}": np.array(tokens), f"logits{len(prompt)}": logits}
    np.savez(folder / "answers.npz", **known)


def test_what_is_equal_is_kept_whole(folder: Path, tmp_path: Path) -> None:
    found = export_model(folder, "fake", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.fake", "said.json"]
    assert json.loads((tmp_path / "out" / "said.json").read_text()) == ["float32", None]
    assert found.comparison.difference < 1e-4 and found.comparison.equal_tokens == found.comparison.tokens == 2 * NEW_TOKENS
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert "numpy" in found.versions


def test_what_differs_is_not_kept(folder: Path, tmp_path: Path) -> None:
    answers_of(folder, error=5.0)
    with pytest.raises(ValueError, match=r"Expected Fake to compute what transformers .* differ by at most 5 of"):
        export_model(folder, "fake", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_what_a_quantizer_does_is_said_and_kept(folder: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["export", str(folder), "--to", "gguf", "--quantize", "int3"])
    assert said.exit_code == 1 and "one of Q8_0" in said.output
    out = ["--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "fake", "--quantize", "INT8", *out])
    plain = json.loads(done.stdout)
    assert plain["quantize"] == "int8" and plain["quantized"]["difference"] == pytest.approx(0.5, abs=1e-3)
    assert plain["comparison"]["difference"] < 1e-4
    assert json.loads((tmp_path / "out" / "said.json").read_text()) == ["float32", "int8"]


def test_a_converter_that_fails_is_quoted(folder: Path, tmp_path: Path) -> None:
    (folder / "broken").touch()
    with pytest.raises(ValueError, match="Fake to convert to float32, got: the converter does not know this tokenizer"):
        export_model(folder, "fake", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_a_reader_takes_for_another_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", num_hidden_layers=12, query_pre_attn_scalar=8)
    drop_layers(model, [1, 3, 6, 8, 10])
    model.save_pretrained(tmp_path / "model")
    for to in ("gguf", "mlx"):
        with pytest.raises(ValueError, match=r"reads as transformers 5 does, .* works out what each layer is .*--portable"):
            export_model(tmp_path / "model", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacking", ["blocks that lack a sublayer", "layers of different widths"])
def test_what_no_reader_knows_is_refused_by_every_format(lacking: str, tmp_path: Path) -> None:
    model = tiny_model()
    if "widths" in lacking:
        batches = [{"input_ids": text["input_ids"][None]} for text in tiny_texts(8)]
        slice_model(model, batches, 0.4, multiple=1, progress=False)
    else:
        drop_layers(model, [3], unit="sublayer")
    model.save_pretrained(tmp_path / "model")
    for to in FORMATS:
        with pytest.raises(ValueError, match=f"does not know {lacking}"):
            export_model(tmp_path / "model", to, tmp_path / "out")


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = Format(tool="fake_runtime", runtime="Fake", reader=None, packages={"no_such.module": "no-such>=2"})
    monkeypatch.setattr(export, "FORMATS", {"fake": lacking})
    with pytest.raises(ValueError, match=r"Expected no-such>=2 in .* to export to fake, got none. .*runtimes.*--python"):
        export_model(folder, "fake", tmp_path / "out")
    with pytest.raises(ValueError, match="Expected a Python interpreter, got /no/python"):
        export_model(folder, "fake", tmp_path / "out", python="/no/python")


def test_a_missing_quantizer_is_named_before_anything_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "llama.cpp").mkdir()
    tool = Tool(FORMATS["gguf"], sys.executable, {"llama_cpp": str(tmp_path / "llama.cpp")})
    with pytest.raises(ValueError, match=r"no convert_hf_to_gguf\.py in .*--llama-cpp"):
        tool.check(None)
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").touch()
    tool.check("Q8_0")  # the script's own
    with pytest.raises(ValueError, match="no program llama-quantize, which makes Q4_K_M"):
        tool.check("Q4_K_M")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "tflite"}, "one of gguf, onnx"),
        ({"to": "onnx", "quantize": "Q8_0"}, "one of int8 to quantize onnx to"),
        ({"to": "onnx", "dtype": "int7"}, "one of float32"),
        ({"to": "fake", "out": "model"}, "new or empty folder"),
        ({"to": "fake", "folder": "elsewhere"}, "without a config.json.*hf download NAME --local-dir FOLDER"),
    ],
)
def test_wrong_arguments(folder: Path, tmp_path: Path, arguments: dict[str, str], said: str) -> None:
    paths = {name: tmp_path / arguments.pop(name, usual) for name, usual in (("folder", "model"), ("out", "out"))}
    with pytest.raises(ValueError, match=said):
        export_model(**paths, **arguments)


def test_logits_that_are_no_numbers_are_an_error(folder: Path) -> None:
    reference = Reference(folder)
    wrong = np.full((2, reference.model.config.vocab_size), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="not in every row numbers"):
        compare(reference, [[5, 6, 7]], [([1, 2], wrong)])


def test_a_prompt_reaches_beyond_the_sliding_window() -> None:
    config = tiny_model("gemma3_text", max_position_embeddings=256, sliding_window=64).config
    assert max(map(len, prompts_for(Path("nowhere"), config))) == 96
