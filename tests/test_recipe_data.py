"""The recipes' data: files and Hub rows, splits that share nothing, labels, launch lines, exact match."""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed")
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.append(str(RECIPES))
from questions import choice_accuracy, data, demo  # noqa: E402
from questions.choice_accuracy import Question, QuestionEncoder  # noqa: E402

PACKAGE = "trimllm_hf"
NAMES = ("medical", "legal", "finance", "classification")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipes' modules: `room("finance")`."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


@pytest.fixture
def encoder() -> QuestionEncoder:
    """A word is a token, and all words but a few are unknown."""
    words = "<pad> </s> <unk> Question : Answer one two three four five yes no maybe ?".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return QuestionEncoder(fast, 24)


def texts(*numbers: int, label: str | None = None) -> list[dict[str, str]]:
    """Labelled texts; the label says whether the number is even."""
    return [{"text": f"text number {n}", "label": label or ("yes" if n % 2 else "no")} for n in numbers]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(room: Any, encoder: QuestionEncoder, tmp_path: Path) -> Any:
    """Questions of splits that are given as rows: `load(train=[…], test=[…], drop_overlap=True)`."""

    def load(*, seed: int = 0, **given: Any) -> dict[str, list[Question]]:
        files = {
            f"{split}_file": write(tmp_path / f"{split}.jsonl", given.pop(split))
            for split in ("train", "validation", "test")
            if split in given
        }
        finance = room("finance")
        return data.load_questions(data.DataArguments(**files, **given), finance.HUB, finance.ASKS, encoder, seed)

    return load


# ---- files


def test_a_csv_file_without_header_gives_questions(room: Any, tmp_path: Path) -> None:
    path = tmp_path / "law_test.csv"
    path.write_text('"Which, of these?",one,two,three,four,C\nWhat?,a,b,c,d,a\n', encoding="utf-8")
    assert list(data.read_file(str(path))) == [
        {"question": "Which, of these?", "choices": ["one", "two", "three", "four"], "answer": 2},
        {"question": "What?", "choices": ["a", "b", "c", "d"], "answer": 0},
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.csv",
            "What?,a,b,c,d,E\n",
            r"letter of the right choice, got 6 cells .*'E' in row 1 of .*(.|\n)*Such as:\nWhich organ",
        ),
        ("a.csv", "question\n", "got 1 cells"),
        ("a.jsonl", '{"text": "one", "label": "yes"}\nno json\n', "a JSON object a line, got 'no json' in line 2"),
        ("a.jsonl", "[1, 2]\n", r"a JSON object a line, got '\[1, 2\]' in line 1"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(room: Any, tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        list(data.read_file(str(path)))


def test_a_text_may_hold_any_character(room: Any, tmp_path: Path) -> None:
    """JSON lets line separators stand in a text as they are; an empty line at the end is none."""
    rows = [{"text": f"one{mark}two", "label": "yes"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    assert list(data.read_file(str(path))) == rows


# ---- splits


def test_every_label_can_be_answered_in_every_split(load: Any) -> None:
    splits = load(train=texts(*range(10)), validation=texts(20, 22), test=texts(21, 24))
    assert {split: len(part) for split, part in splits.items()} == {"train": 10, "validation": 2, "test": 2}
    for part in splits.values():
        assert {question.choices for question in part} == {("no", "yes")}
    assert [(q.context, q.right) for q in sorted(splits["test"], key=lambda q: q.context)] == [
        ("text number 21", "yes"),
        ("text number 24", "no"),
    ]


def test_without_test_data_the_validation_data_are_the_test(load: Any) -> None:
    splits = load(train=texts(*range(10)), validation=texts(20, 21))
    assert splits["test"] == splits["validation"] and len(splits["test"]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_out_is_not_trained_on(load: Any, seed: int) -> None:
    """Also where a text stands in the file several times."""
    numbers = random.Random(seed).choices(range(30), k=100)
    splits = load(train=texts(*numbers), seed=seed)
    trained, held_out = ({q.context for q in splits[split]} for split in ("train", "validation"))
    assert trained and held_out and not trained & held_out
    assert trained | held_out == {f"text number {n}" for n in numbers}


def test_a_row_in_two_splits_is_refused_with_the_count(load: Any) -> None:
    test = [*texts(3, 50), {"text": "  Text NUMBER\n4 ", "label": "no"}]
    with pytest.raises(
        ValueError, match=r"train.jsonl that are not in .*test.jsonl, got 2 of 10 .*'text number 3'.*--drop_overlap"
    ):
        load(train=texts(*range(10)), test=test)
    with pytest.raises(ValueError, match=r"validation.jsonl that are not in .*test.jsonl, got 1 of 2"):
        load(train=texts(*range(10)), validation=texts(30, 31), test=texts(31, 40))


def test_drop_overlap_leaves_the_test_data_whole(load: Any) -> None:
    splits = load(train=texts(*range(10)), test=texts(3, 4, 50), drop_overlap=True, validation=texts(3, 60))
    named = {split: sorted(int(q.context.split()[-1]) for q in part) for split, part in splits.items()}
    assert named == {"train": [0, 1, 2, 5, 6, 7, 8, 9], "validation": [60], "test": [3, 4, 50]}
    with pytest.raises(ValueError, match=r"train.jsonl without the rows of .*test.jsonl, got none"):
        load(train=texts(1, 2), test=texts(1, 2, 3), validation=texts(8, 9), drop_overlap=True)


def test_the_same_question_with_other_choices_is_another(load: Any) -> None:
    """Many ask "which of these is true?"; with the same right answer it is the same question."""
    asked = {"question": "which is true ?", "choices": ["one", "two"], "answer": 0}
    train = [{**asked, "choices": [word, "no"]} for word in ("three", "four", "five")]
    assert len(load(train=train, test=[asked])["test"]) == 1
    with pytest.raises(ValueError, match="got 1 of 4"):
        load(train=[*train, {**asked, "choices": ["five", "one"], "answer": 1}], test=[asked])


def test_a_label_that_is_not_trained_is_refused(load: Any) -> None:
    with pytest.raises(
        ValueError, match=r"same labels in every split, got \['No'\] in .*test.jsonl, which .*train.jsonl has not"
    ):
        load(train=texts(*range(10)), test=texts(20, label="No"), validation=texts(30, 31))
    with pytest.raises(ValueError, match="two labels or more"):
        load(train=texts(0, 2, 4), test=texts(20), validation=texts(22))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_refused(load: Any, split: str) -> None:
    given = {"train": texts(*range(10)), "validation": texts(20, 21), "test": texts(30, 31)}
    with pytest.raises(ValueError, match=rf"questions in .*{split}.jsonl, got none: it is empty"):
        load(**given | {split: []})


def test_a_split_whose_answers_do_not_fit_is_refused(load: Any) -> None:
    long = {"question": "one ?", "choices": ["two " * 40, "no"], "answer": 0}
    with pytest.raises(ValueError, match=r"choices fit in 24 tokens, got none among 1 of .*test.jsonl"):
        load(train=texts(*range(10)), validation=texts(20, 21), test=[long])


def test_choices_can_be_fewer_than_the_labels(load: Any) -> None:
    rows = [{"text": f"text {n}", "label": ("one", "two", "three", "four", "five")[n % 5]} for n in range(100)]
    splits = load(train=rows[:50], test=rows[50:], validation=texts(1, label="one"), max_choices=3)
    assert splits == load(train=rows[:50], test=rows[50:], validation=texts(1, label="one"), max_choices=3)
    for question in splits["train"]:
        assert len(set(question.choices)) == 3
        assert question.right == rows[int(question.context.split()[1])]["label"]
    assert {q.answer for q in splits["train"]} == {0, 1, 2}  # the right one's place tells nothing


# ---- the Hub


@pytest.mark.parametrize(
    ("recipe", "name", "row", "made"),
    [
        (
            "medical",
            "qiaojin/PubMedQA",
            {"question": "Does it?", "context": {"contexts": ["We saw.", "We said."]}, "final_decision": "maybe"},
            ("Does it?", ("yes", "no", "maybe"), 2, "We saw. We said.", False),
        ),
        (
            "medical",
            "openlifescienceai/medmcqa",
            {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3},
            ("Which?", ("a", "b", "c", "d"), 3, "", False),
        ),
        (
            "medical",
            "allenai/sciq",
            {
                "question": "What?",
                "correct_answer": "m",
                "distractor1": "z",
                "distractor2": "a",
                "distractor3": "b",
                "support": "S.",
            },
            ("What?", ("a", "b", "m", "z"), 2, "S.", False),
        ),
        (
            "legal",
            "coastalcph/lex_glue",
            {"context": "See (<HOLDING>).", "endings": ["a", "b", "c", "d", "e"], "label": 4},
            ("Which holding is cited?", ("a", "b", "c", "d", "e"), 4, "See (<HOLDING>).", True),
        ),
        (
            "finance",
            "zeroshot/twitter-financial-news-sentiment",
            {"text": "up", "label": 1},
            ("Is this bearish, bullish or neutral?", ("bearish", "bullish"), 1, "up", False),
        ),
    ],
)
def test_hub_rows_become_questions(room: Any, recipe: str, name: str, row: dict[str, Any], made: tuple[Any, ...]) -> None:
    """A row with the fields that the data set's card names; a long context, so that nothing is cut."""
    module = room(recipe)
    split = data.Split([module.HUB[name].to_row(row)], "the Hub")
    whole = SimpleNamespace(fitting=lambda made, source: made)
    assert data.make_questions(split, whole, 0, module.ASKS, ("bearish", "bullish")) == [Question(*made)]


def test_finance_alpaca_answers_are_ranked_against_others(room: Any) -> None:
    rows = [{"instruction": f"Explain {n}", "input": "in short", "output": f"It is {n}"} for n in range(6)]
    shape = room("finance").HUB["gbharti/finance-alpaca"].to_row
    whole = SimpleNamespace(fitting=lambda made, source: made)
    made = data.make_questions(data.Split([shape(row) for row in rows], "the Hub"), whole, 0, "?")
    assert [(q.text, q.right) for q in made] == [(f"Explain {n} in short", f"It is {n}") for n in range(6)]
    assert all(len(set(q.choices)) == 4 and q.per_token for q in made)


def test_hub_splits_labels_by_name_and_without_the_unlabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})
    part = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> DatasetDict:
        asked.append((args, kwargs))
        return DatasetDict(train=part, test=part, unsupervised=part)

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    recipe = data.DataArguments(dataset_name="fancyzhx/ag_news", dataset_revision="abc")
    found = data.read_hub(recipe, data.HubData("unknown", unlabelled=("test",)))
    assert found == {"train": [{"text": "a", "label": "Sports"}, {"text": "b", "label": "World"}]}
    assert asked == [(("fancyzhx/ag_news", None), {"revision": "abc"})] and recipe.dataset_revision == "abc"


# ---- settings


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_lines_of_a_docstring_are_right(
    room: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is parsed as the recipe would; the launch files that they name are there."""
    monkeypatch.chdir(tmp_path)  # where TrainingArguments may make folders
    module = room(name)
    manual = re.sub(r" \\\n\s+", " ", module.__doc__)
    lines = [
        line.split("#")[0] for line in manual.splitlines() if re.match(r"\s+(python|torchrun|accelerate launch) ", line)
    ]
    assert {line.split()[0] for line in lines} == {"python", "torchrun", "accelerate"}
    for line in lines:
        words = shlex.split(line)
        for word in words:
            assert not word.startswith("recipes/") or (RECIPES.parent / word).is_file(), word
        flags = [word for word in words[words.index(f"recipes/{name}.py") + 1 :] if word != "--bf16"]
        assert module.parse(flags)[0].dataset_name in module.HUB


def test_a_given_flag_wins_over_the_demos(room: Any, tmp_path: Path) -> None:
    legal = room("legal")
    recipe, trim, args = legal.parse(["--demo", "--max_steps", "7", "--output_dir", str(tmp_path)])
    assert (args.max_steps, args.output_dir, trim.target_layers, recipe.compare_full_depth) == (7, str(tmp_path), 6, True)
    recipe, trim, args = legal.parse(["--output_dir", str(tmp_path), "--target-layers", "3"])
    assert (trim.target_layers, trim.target_ratio, recipe.compare_full_depth) == (3, None, False)


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        ([], ("coastalcph/lex_glue", "case_hold")),
        (["--dataset_config_name", "ledgar"], ("coastalcph/lex_glue", "ledgar")),
        (["--dataset_name", "org/other"], ("org/other", None)),
    ],
)
def test_a_data_set_is_read_in_the_configuration_that_the_recipe_knows(
    room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], read: tuple[str, str | None]
) -> None:
    asked = []
    monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: asked.append(args) or {})
    legal = room("legal")
    recipe, *_ = legal.parse(["--output_dir", str(tmp_path), *flags])
    with pytest.raises(ValueError, match=rf"train, validation or test in {read[0]}, got \[\]"):
        data.load_questions(recipe, legal.HUB, legal.ASKS, None, 0)
    assert asked == [read]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_taken_away(name: str) -> None:
    """It is one file of a readable length that needs the library of questions, and of ours only public names."""
    tree = ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imported if module.split(".")[0] == PACKAGE}
    beside = {module for module in imported if (RECIPES / f"{module.split('.')[0]}.py").exists()}
    assert ours == {PACKAGE} and beside == ({"finance", "medical"} if name == "classification" else set())
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= (300 if name == "classification" else 200)
    modules = sorted((RECIPES / "questions").rglob("*.py"))
    assert len(modules) <= 4
    assert sum(len(module.read_text().splitlines()) for module in modules) <= 700


@pytest.mark.parametrize("name", ["medical", "legal", "finance"])
def test_a_demo_asks_what_its_textbook_implies_and_does_not_say(room: Any, name: str) -> None:
    """The right answer is that of the member's class, and no sentence of the textbook names both."""
    words_of = room(name).DEMO
    textbook, train, test = demo.make_domain(words_of, seed=1)
    words = [set(sentence.split()) for sentence in textbook]
    classes = {word for sentence in words for word in sentence if word.endswith(words_of.family)}
    assert not {q["question"] for q in train} & {q["question"] for q in test} and len(train) + len(test) == 800
    answers = [set(values.split()) for _, _, values in words_of.relations]
    assert sum(map(len, answers)) == len(set.union(*answers))  # an answer tells the relation
    for question in test:
        right = question["choices"][question["answer"]]
        assert len(set(question["choices"])) == 4
        member = next(word for word in re.findall(r"\w+", question["question"]) if word.endswith(words_of.member))
        (family,) = {word for sentence in words if member in sentence for word in sentence & classes}
        assert any(family in sentence and right in sentence for sentence in words)
        assert not any(member in sentence and right in sentence for sentence in words)


# ---- exact match


def test_exact_match_on_a_case_worked_out_by_hand(encoder: QuestionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_accuracy, "write", lambda *_: ["Yes", " the  liver", "no no", ""])
    questions = [Question("?", (right, "other"), 0) for right in ("yes", "The liver", "no", "no")]
    assert choice_accuracy.exact_match(None, questions, encoder, 4) == {"exact_match": 0.5, "exact_match_error": 0.25}


def test_a_batch_writes_what_each_question_alone_would(encoder: QuestionEncoder) -> None:
    """Padding on the left changes nothing: the reference generates from each prompt by itself, token by token."""
    torch.manual_seed(0)
    model = tiny_model("llama").eval()
    contexts = ["", "one", "two three four", "five " * 9]
    questions = [Question("one ?", ("yes", "no no no"), 0, context) for context in contexts]
    written = choice_accuracy.write(model, questions, encoder, batch_size=3)
    for question, text in zip(questions, written, strict=True):
        ids = encoder.prompt(question)
        for _ in range(encoder.longest(questions)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = encoder.tokenizer.decode(ids[len(encoder.prompt(question)) :], skip_special_tokens=True)
        assert text == expected
    score = choice_accuracy.exact_match(model, questions, encoder, batch_size=2)
    assert score["exact_match"] == sum(text.split() == ["yes"] for text in written) / 4


def test_only_short_answers_are_written(encoder: QuestionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_accuracy, "write", lambda *_: ["yes"])
    match = lambda *asked: choice_accuracy.exact_match(None, [Question("?", *asked)], encoder, 1)  # noqa: E731
    assert match(("yes", "no"), 0)["exact_match"] == 1
    assert match(("yes", "one " * 20), 0) == match(("yes", "no"), 0, "", True) == {}
