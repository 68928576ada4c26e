"""The recipes: rows to questions, the offline metric, and whole runs of the medical one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.append(str(RECIPES))
from questions import data  # noqa: E402
from questions.choice_accuracy import Question, QuestionEncoder  # noqa: E402


@pytest.fixture
def encoder() -> QuestionEncoder:
    """A word is a token; nothing is unknown but by intent."""
    words = "<pad> </s> <unk> Question : Answer context one two three four five yes no maybe ?".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return QuestionEncoder(fast, 16)


def test_the_metric_on_a_case_worked_out_by_hand() -> None:
    metric = evaluate.load(str(RECIPES / "questions" / "choice_accuracy.py"), keep_in_memory=True)
    scores = {"predictions": [[-1.0, -2.0], [-3.0, -0.5], [-4.0, -3.0]], "references": [0, 0, 0]}
    plain = metric.compute(**scores)
    assert plain["accuracy"] == pytest.approx(1 / 3) and plain["questions"] == 3
    assert plain["standard_error"] == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    # per token the third question's first choice wins: -4/8 against -3/2
    assert metric.compute(**scores, lengths=[[1, 1], [1, 1], [8, 2]])["accuracy"] == pytest.approx(2 / 3)


def test_labels_stand_on_the_answer_alone(encoder: QuestionEncoder) -> None:
    example = encoder.example(Question("one ?", ("yes", "no"), 0), "yes")
    answer = encoder.tokenizer.convert_tokens_to_ids(["yes", "</s>"])
    assert example["input_ids"][-2:] == answer
    assert example["labels"] == [-100] * (len(example["input_ids"]) - 2) + answer


def test_a_long_context_loses_its_beginning_and_an_answer_nothing(encoder: QuestionEncoder) -> None:
    question = Question("one ?", ("yes", "no"), 0, context="context " * 30 + "five")
    ids = encoder.example(question, "yes")["input_ids"]
    assert len(ids) == 16
    assert encoder.tokenizer.decode(ids).endswith("five Question : one ? Answer : yes </s>")


def test_answers_that_do_not_fit_are_refused_when_none_fits(encoder: QuestionEncoder) -> None:
    with pytest.raises(ValueError, match="choices fit in 16 tokens, got none among 1 of the file"):
        encoder.fitting([Question("one ?", ("two " * 20, "no"), 0)], "the file")


def test_rivals_are_of_the_same_type_and_another_focus(encoder: QuestionEncoder) -> None:
    rows = [
        {"question": "one ?", "answer": word, "qtype": qtype, "focus": f"{qtype}{word}"}
        for qtype in ("causes", "symptoms")
        for word in (("one", "two", "three", "four") if qtype == "causes" else ("yes", "no", "maybe", "five"))
    ]
    made = data.make_questions(data.Split(rows, "the file"), encoder, 0, "what ?")
    assert len(made) == 8
    for question, row in zip(made, rows, strict=True):
        assert question.right == row["answer"]
        same_type = {other["answer"] for other in rows if other["qtype"] == row["qtype"]}
        assert set(question.choices) == same_type and question.per_token
    assert made == data.make_questions(data.Split(rows, "the file"), encoder, 0, "what ?")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "questions in the file, got none: it is empty"),
        ([{"question": "one ?"}], r"Expected the fields .*got \['question'\] in row 1 of the file(.|\n)*What causes gout"),
        ([{"question": "one ?", "context": "", "label": "perhaps"}], "label of .*got 'perhaps' in row 1"),
        ([{"question": "one ?", "choices": ["yes", "no"], "answer": 2}], "index of one of .*got 2 in row 1"),
        ([{"text": "one", "label": "yes"}, {"text": "two"}], r"fields \['text', 'label'\], got \['text'\] in row 2 .*"),
        ([{"text": "one", "label": 3}], "as label a word or words, got 3 in row 1"),
    ],
)
def test_rows_that_make_no_sense_are_refused(rows: Any, said: str, encoder: QuestionEncoder) -> None:
    with pytest.raises(ValueError, match=said):
        data.make_questions(data.Split(rows, "the file"), encoder, 0, "what ?")


def run_recipe(*arguments: str, timeout: float) -> str:
    command = [sys.executable, str(RECIPES / "medical.py"), *arguments, "--disable_tqdm", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    """Both fine-tuned models are far above the chance of 0.25, and the trimmed one has half of the layers."""
    output = run_recipe("--demo", "--output_dir", str(tmp_path), timeout=400)
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    trimmed, full = rows["trimmed and fine-tuned"], rows["full depth, fine-tuned"]
    assert (trimmed["layers"], full["layers"]) == (6, 12)
    assert trimmed["accuracy"] - 4 * trimmed["standard_error"] > 0.25 < full["accuracy"] - 4 * full["standard_error"]
    assert trimmed["parameters"] < full["parameters"]
    assert "<- chosen" in output and "Generated:" in output


@pytest.mark.slow
def test_medquad_with_a_real_small_model(shared: Path, tmp_path: Path) -> None:
    run_recipe(
        *("--model_name_or_path", str(shared / "models" / "stories260K"), "--target_layers", "3"),
        *("--train_file", str(shared / "data" / "medquad" / "train.jsonl")),
        *("--validation_file", str(shared / "data" / "medquad" / "valid.jsonl")),
        *("--max_length", "256", "--max_train_samples", "800", "--max_eval_samples", "40", "--max_steps", "40"),
        *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--save_strategy", "no"),
        *("--calibration_size", "16", "--output_dir", str(tmp_path)),
        timeout=580,
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["trim"]["base_num_layers"] == 5


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_accelerate_reads_each_launch_file(name: str) -> None:
    """It opens with its launch command, and every key in it is one that accelerate knows."""
    from accelerate.commands.config.config_args import load_config_from_file

    file = RECIPES / "accelerate" / f"{name}.yaml"
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file recipes/accelerate/{name}.yaml recipes/medical.py")
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(name, "DEEPSPEED")
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
