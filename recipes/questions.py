"""Rows of a JSON Lines file or of a data set on the Hub, as multiple-choice questions; shared by the recipes."""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers.utils import logging

from trimllm_hf.choice_accuracy import Question, QuestionEncoder
from trimllm_hf.publish.run import source_of

logger = logging.get_logger("transformers.trimllm_hf")

DECISIONS = ("yes", "no", "maybe")
SHAPES: dict[str, dict[str, Any]] = {
    "choices": {"question": "Which organ does insulin act on?", "choices": ["the liver", "the lens"], "answer": 0},
    "pubmedqa": {"question": "Does aspirin prevent stroke?", "context": "We followed 200 …", "label": "maybe"},
    "medquad": {"question": "What causes gout?", "answer": "Uric acid …", "qtype": "causes", "focus": "Gout"},
}


def load_questions(recipe: Any, encoder: QuestionEncoder, seed: int) -> dict[str, list[Question]]:
    """Questions of the splits `train` and `validation`, from local files or from the Hub."""
    files = {"train": recipe.train_file, "validation": recipe.validation_file}
    if any(files.values()):
        rows = {split: read_json_lines(path) for split, path in files.items() if path}
    else:
        parts = load_dataset(recipe.dataset_name, recipe.dataset_config_name)
        rows = {split: [from_hub(row) for row in part] for split, part in parts.items()}
        recipe.dataset_revision = (source_of(next(iter(parts.values()))) or {}).get("revision")
        files = dict.fromkeys(("train", "validation"), recipe.dataset_name)
    held_out = rows.get("validation", rows.get("test"))
    if held_out is None:
        shuffled = random.Random(seed).sample(rows["train"], len(rows["train"]))
        rows["train"], held_out = shuffled[len(shuffled) // 5 :], shuffled[: len(shuffled) // 5]
    splits = {"train": rows.get("train"), "validation": held_out}
    limits = {"train": recipe.max_train_samples, "validation": recipe.max_eval_samples}
    questions = {}
    for split, split_rows in splits.items():
        if split_rows is not None:
            source = f"the {split} split of {files[split] or files['train']}"
            questions[split] = make_questions(split_rows, source, encoder, seed)
            size = min(len(questions[split]), limits[split] or len(questions[split]))
            questions[split] = random.Random(seed).sample(questions[split], size)
    return questions


def read_json_lines(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected a JSON object a line, got {line[:60]!r} in line {number} of {path}.") from error
    return rows


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """A row of PubMedQA as the Hub has it, in the shape of a file; any other row as it is."""
    if "final_decision" not in row:
        return row
    return {**row, "context": " ".join(row["context"]["contexts"]), "label": row["final_decision"]}


def check_rows(rows: list[dict[str, Any]], source: str) -> str:
    """The shape of the rows; an error, with an example, where a field is missing or senseless."""
    if not rows:
        raise ValueError(f"Expected questions in {source}, got none: it is empty.")
    shape = next((name for name, example in SHAPES.items() if example.keys() <= rows[0].keys()), "")
    wanted = [SHAPES[shape]] if shape else list(SHAPES.values())
    for number, row in enumerate(rows, start=1):
        where = f"in row {number} of {source}"
        if not shape or not wanted[0].keys() <= row.keys():
            fields = " or ".join(str(list(example)) for example in wanted)
            lines = "\n".join(json.dumps(example, ensure_ascii=False) for example in wanted)
            raise ValueError(f"Expected the fields {fields}, got {list(row)} {where}. A row looks like this:\n{lines}")
        if shape == "pubmedqa" and row["label"] not in DECISIONS:
            raise ValueError(f"Expected a label of {DECISIONS}, got {row['label']!r} {where}.")
        if shape == "choices" and row["answer"] not in range(len(row["choices"])):
            raise ValueError(f"Expected as answer the index of one of {row['choices']}, got {row['answer']!r} {where}.")
    return shape


def make_questions(rows: list[dict[str, Any]], source: str, encoder: QuestionEncoder, seed: int) -> list[Question]:
    """Questions from rows of any shape; the choices of MedQuAD are drawn with `seed`."""
    shape = check_rows(rows, source)
    if shape == "choices":
        return encoder.fitting([Question(r["question"], tuple(r["choices"]), r["answer"]) for r in rows], source)
    if shape == "pubmedqa":
        made = [Question(r["question"], DECISIONS, DECISIONS.index(r["label"]), r["context"]) for r in rows]
        return encoder.fitting(made, source)
    # what is too long goes before choices are drawn: otherwise most questions would go for the sake of a long rival
    alone = {Question(r["question"], (r["answer"],), 0): r for r in rows}
    rows = [alone[question] for question in encoder.fitting(list(alone), source)]
    rng, by_type, made = random.Random(seed), defaultdict(list), []
    for row in rows:
        by_type[row["qtype"]].append(row)
    for row in rows:
        drawn = rng.sample(by_type[row["qtype"]], min(16, len(by_type[row["qtype"]])))
        # of another focus: what a second source says to the same question could be right as well
        rivals = dict.fromkeys(r["answer"] for r in drawn if r["focus"] != row["focus"] and r["answer"] != row["answer"])
        if len(rivals) >= 3:
            choices = rng.sample([row["answer"], *list(rivals)[:3]], 4)
            made.append(Question(row["question"], tuple(choices), choices.index(row["answer"]), per_token=True))
    if len(made) < len(rows):
        logger.warning(f"{source}: left out {len(rows) - len(made)} questions, which have no three rivals of their type.")
    if not made:
        raise ValueError(f"Expected four answers to one type of question in {source}, got no type with so many.")
    return encoder.fitting(made, source)
