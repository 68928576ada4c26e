"""lm-eval's harness (EleutherAI) runs a trimmed model as it is, and finds what we find."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval, which is not installed: pip install -e '.[harness]'", allow_module_level=True)
pytest.importorskip("evaluate", reason="evaluate is not installed")
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimllm_hf import drop_layers

sys.path.append(str(Path(__file__).parent.parent / "recipes"))
from questions.choice_accuracy import Question, QuestionEncoder, log_likelihoods, score_questions

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_the_harness_and_we_agree(tmp_path: Path) -> None:
    """The same accuracy, and the same log-likelihood of every choice, its end of text included."""
    words = [f"w{n}" for n in range(60)]
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Question", "Answer", ":", *words])}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model("llama")
    drop_layers(model, [2, 4])
    model.save_pretrained(tmp_path / "model")
    rng = random.Random(0)

    def draw(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    questions = [Question(draw(8), tuple(draw(3) for _ in range(4)), rng.randrange(4)) for _ in range(60)]
    file = tmp_path / "questions.jsonl"
    rows = [
        {"question": q.text, "choices": [f"{choice}</s>" for choice in q.choices], "answer": q.answer} for q in questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(TASK.format(file=file), encoding="utf-8")

    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "8", "--log_samples"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks", "ours"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_ours_*.jsonl")
    theirs = json.loads(results.read_text())["results"]["ours"]["acc,none"]
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert stock.config.num_hidden_layers == 4
    encoder = QuestionEncoder(tokenizer, 64)
    ours = score_questions(stock, questions, encoder, batch_size=8)
    assert ours["accuracy"] == theirs and 0 < theirs < 1
    examples = [encoder.example(q, choice) for q in questions for choice in q.choices]
    expected = [total for total, _ in log_likelihoods(stock, examples, encoder, 8)]
    given = [float(answer[0]) for sample in found for answer in sample["filtered_resps"]]
    assert given == pytest.approx(expected, abs=1e-4)
