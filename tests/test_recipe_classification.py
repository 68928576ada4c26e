"""The classification recipe: the first k blocks, words and heads, which depth is published."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed")
import torch
from small_base import LABELS, WORDS, save_base, save_texts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


@pytest.fixture
def run(room: Any, tmp_path: Path) -> Any:
    """A run of the recipe on a tiny base; gives the table."""

    def run(family: str, *flags: str) -> list[dict[str, Any]]:
        base = save_base(tmp_path / "base", family)
        files = [save_texts(tmp_path / f"{split}.jsonl", 60, seed) for seed, split in enumerate(("train", "valid"))]
        room("classification").main(
            [
                *("--model_name_or_path", base, "--train_file", files[0], "--validation_file", files[1], "--drop_overlap"),
                *("--output_dir", str(tmp_path / "runs"), "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
                *("--disable_tqdm", "true", "--max_length", "32", "--per_device_train_batch_size", "16", *flags),
            ]
        )
        return json.loads((tmp_path / "runs" / "results.json").read_text())

    return run


def test_the_first_blocks_of_a_decoder_are_kept(run: Any, tmp_path: Path) -> None:
    """At a learning rate of 0 the saved model is the base with its top cut off, by an independent cut."""
    rows = run("llama", "--depths", "2", "6", "--max_steps", "2", "--learning_rate", "0", "--publish_depth", "2")
    assert [row["layers"] for row in rows] == [6, 2]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[7, 8, 9, 10]])
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "6-of-6")
    assert torch.equal(full(ids).logits, base(ids).logits)
    base.model.layers = base.model.layers[:2]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "2-of-6")
    assert saved.config.num_hidden_layers == 2
    assert torch.equal(saved(ids).logits, base(ids, use_cache=False).logits)
    card = (tmp_path / "runs" / "2-of-6" / "README.md").read_text()
    assert "telling what a text is" in card and f"{rows[1]['accuracy']:.3f}"[1:5] in card


@pytest.mark.slow
def test_an_encoder_learns_with_a_head(run: Any, tmp_path: Path) -> None:
    """Two of BERT's six blocks learn a task that the first word decides, and the head knows the labels' names."""
    rows = run("bert", "--depths", "2", "--max_steps", "40", "--learning_rate", "1e-2", "--max_eval_samples", "30")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "2-of-6")
    assert model.config.num_hidden_layers == 2 and model.config.id2label == dict(enumerate(LABELS))
    assert "text-classification" in (tmp_path / "runs" / "2-of-6" / "README.md").read_text()
    assert rows[0]["questions"] == 30 and rows[0]["accuracy"] - 3 * rows[0]["standard_error"] > 1 / 3


def test_a_decoder_learns_the_words_of_the_verbalizer(run: Any, tmp_path: Path) -> None:
    words = json.dumps(dict(zip(LABELS, ("bad", "good", "so"), strict=True)))
    rows = run("llama", "--depths", "6", "--max_steps", "40", "--learning_rate", "3e-3", "--verbalizer", words)
    assert rows[0]["accuracy"] - 3 * rows[0]["standard_error"] > 1 / 3
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "6-of-6")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "6-of-6")
    prompt = tokenizer(f"{WORDS[4]} w20 w30\nQuestion: What is this about?\nAnswer:", return_tensors="pt").input_ids
    assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) in ("bad", "good", "so")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{no", "as JSON"),
        ('{"a": "x"}', r"a word of its own for each label of \['a', 'b'\]"),
        ('{"a": "x", "b": "y", "c": "z"}', "a word of its own"),
        ('{"a": "x", "b": "x"}', "a word of its own"),
        ('["x", "y"]', "a word of its own"),
    ],
)
def test_a_verbalizer_that_makes_no_sense_is_refused(room: Any, given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        room("classification").verbalize(["a", "b"], given)


def test_depths_that_the_base_has_not_are_refused(room: Any, tmp_path: Path) -> None:
    recipe = room("classification")
    base = {"model_name_or_path": save_base(tmp_path), "publish_depth": None}
    assert recipe.depths_of(SimpleNamespace(**base, depths=None)) == (6, [6, 5, 4, 3, 2, 1])
    assert recipe.depths_of(SimpleNamespace(**base, depths=[1, 4, 4])) == (6, [4, 1])
    for depths in ([7], [3, 0], [-1]):
        with pytest.raises(ValueError, match=r"depths from 1 to 6, the depth of"):
            recipe.depths_of(SimpleNamespace(**base, depths=depths))
    with pytest.raises(ValueError, match="one of --depths"):
        recipe.depths_of(SimpleNamespace(**base | {"publish_depth": 2}, depths=[1, 3]))


def test_rows_that_are_no_labelled_texts_are_refused(room: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    rows = [{"question": f"w{n} ?", "choices": ["good", "bad"], "answer": 0} for n in range(9)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--model_name_or_path", base, "--train_file", str(file), "--output_dir", str(tmp_path / "runs"), "--use_cpu"]
    with pytest.raises(ValueError, match="Expected labelled texts to train on"):
        room("classification").main(flags)
    with pytest.raises(ValueError, match="--head auto, verbalizer or classifier, got 'neck'"):
        room("classification").main([*flags, "--head", "neck"])


def test_the_shallowest_within_one_standard_error_is_published(room: Any) -> None:
    rows = [
        {"layers": k, "accuracy": accuracy, "standard_error": 0.02}
        for k, accuracy in ((6, 0.80), (5, 0.83), (4, 0.815), (3, 0.805), (1, 0.82))
    ]
    chosen = room("classification").chosen
    assert chosen(rows[:4], None)["layers"] == 4
    assert chosen(rows, None)["layers"] == 1
    assert chosen(rows, 6)["layers"] == 6
