"""`trimllm score`: the scores of `score_layers`, printed, written and drawn; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import run
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from trimllm_hf import score_layers
from trimllm_hf.cli.examples import read_examples
from trimllm_hf.importance import evaluate_metric

TEXTS = ["w5 w6 w7 w8 w9", "w31 w32 w33", "w40 w41 w42 w43 w44 w45"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize(("unit", "layers"), [("block", 6), ("sublayer", 12)])
def test_it_tells_and_writes_the_scores(unit: str, layers: int, model: Path, data: Path, tmp_path: Path) -> None:
    given = ["score", model, "--data", data, "--unit", unit, "--out", tmp_path / "out", "--batch-size", 2, "--json"]
    plain = json.loads(run(*given))
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == plain
    for name in ("scores.png", "what_if.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert len(plain["layers"]) == layers and plain["examples"] == 3 and plain["scored_tokens"] == 4 + 2 + 5
    ids = [torch.tensor([[int(word[1:]) for word in text.split()]]) for text in TEXTS]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    for name in ("sensitivity", "block_influence"):
        expected = score_layers(tiny_model(), batches, name, unit)
        assert plain["scores"][name] == pytest.approx(expected.tolist(), abs=1e-5)
        lowest = sorted(plain["scores"][name])
        assert plain["margins"][name] == pytest.approx(lowest[1] - lowest[0])
        assert len(plain["standard_errors"][name]) == layers and min(plain["standard_errors"][name]) > 0


def test_the_table_has_the_least_important_first(model: Path, data: Path, tmp_path: Path) -> None:
    shown = run("score", model, "--data", data, "--importance", "first", "--out", tmp_path / "out")
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == ["0", "1", "2", "3", "4", "5"]


def test_per_ms_it_is_what_the_loss_rises_by_over_the_time(model: Path, data: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    given = ["score", model, "--data", data, "--unit", "sublayer", "--per-ms", "--prompt-tokens", 8, *out]
    plain = json.loads(run(*given, "--json"))
    assert len(plain["ms"]) == 12 and len(set(plain["ms"])) == 2 and min(plain["ms"]) > 0
    ids = [torch.tensor([[int(word[1:]) for word in text.split()]]) for text in TEXTS]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    harm = score_layers(tiny_model(), batches, unit="sublayer") - evaluate_metric(tiny_model(), batches)
    expected = [h / ms if h > 0 else h * ms for h, ms in zip(harm.tolist(), plain["ms"], strict=True)]
    assert plain["scores"]["sensitivity per ms"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    shown = run(*given)
    columns = [cell.strip() for line in shown.splitlines() if "┃" in line for cell in line.split("┃")[1:-1]]
    assert columns == ["layer", "sensitivity per ms", "block_influence per ms", "ms"]
    assert "'last'. Its numbers only rank" in run(*given, "--importance", "last", code=1).replace("\n", " ")


def test_the_loss_is_on_the_answer_alone(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "w5 w6 w7", "completion": "w8 w9"}) + "\n")
    plain = json.loads(run("score", model, "--data", path, "--importance", "last", "--out", tmp_path / "out", "--json"))
    assert plain["scored_tokens"] == 2


@pytest.mark.parametrize(
    ("content", "options", "said", "code"),
    [
        ("", [], "got none: it is empty", 1),
        ('{"words": 3}\n', [], 'Expected "text"', 1),
        ('{"text": "w5"}\n', [], "at least two tokens, got none among 1", 1),
        ('{"text": "w5 w6"}\n', ["--importance", "sensitivty"], "sensitivity", 1),
        ('{"text": "w5 w6"}\n', ["--size", "0"], "Expected a number that leaves something to score", 2),
    ],
)
def test_what_makes_no_sense_is_said(
    content: str, options: list[str], said: str, code: int, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    assert said in " ".join(run("score", model, "--data", path, "--out", tmp_path / "out", *options, code=code).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.csv", "prompt,completion\nw5 w6 w7,w8 w9\n"),
        ("pairs.tsv", "question\tanswer\nw5 w6 w7\tw8 w9\n"),
        ("list.json", '[{"prompt": "w5 w6 w7", "completion": "w8 w9"}]'),
        ("marked.jsonl", '\ufeff{"prompt": "w5 w6 w7", "completion": "w8 w9"}\n'),
        ("excel.CSV", '\ufeffprompt,completion\n"w5 w6 w7","w8 w9"\n'),
    ],
)
def test_a_table_of_pairs_is_read_as_pairs(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_examples(tmp_path / name, 4) == [("w5 w6 w7", "w8 w9")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"a,b\n1,2\n", "line 2 of"),
        ("rows.parquet", b"PAR1", r"Expected examples in a .jsonl, .json, .csv, .tsv, .txt or .md file"),
        ("latin.txt", "Müller".encode("latin-1"), "Expected a text file in UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_examples(tmp_path / name, 4)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a file with examples, got .*none\.jsonl .*No such file"):
        read_examples(tmp_path / "none.jsonl", 4)


def test_a_place_that_cannot_be_written_to_is_found_before_scoring(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    said = run("score", model, "--data", data, "--out", tmp_path / "file" / "out", code=1)
    assert "Expected a folder to write to" in " ".join(said.split())
