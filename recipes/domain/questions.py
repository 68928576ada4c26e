"""Rows of one of four shapes, as multiple-choice questions."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers.utils import logging

from trimllm_hf.choice_accuracy import Question

from .rows import Row

logger = logging.get_logger("transformers.trimllm_hf")

DECISIONS = ("yes", "no", "maybe")
SHAPES: dict[str, Row] = {  # the first that fits is a row's
    "choices": {"question": "Which organ does insulin act on?", "choices": ["the liver", "the lens"], "answer": 0},
    "decision": {"question": "Does aspirin prevent stroke?", "context": "We followed 200 …", "label": "maybe"},
    "answer": {"question": "What causes gout?", "answer": "Uric acid …", "qtype": "causes", "focus": "Gout"},
    "label": {"text": "Shares of the bank fell by a tenth.", "label": "bearish"},
}


class Fits(Protocol):
    """What knows how much a model can read: a QuestionEncoder, or another one with this method of it."""

    def fitting(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions that fit."""


@dataclass(frozen=True)
class Asking:
    """How questions are made of labelled texts.

    Attributes:
        text: What is asked of a text.
        labels: What can be answered, the same in every split.
        most: Labels to choose among in a question; None for all.
    """

    text: str
    labels: tuple[str, ...] = ()
    most: int | None = None

    def question(self, row: Row, rng: random.Random) -> Question:
        """The question of a labelled text."""
        labels, right = self.labels, row["label"]
        if self.most is not None and self.most < len(labels):
            others = rng.sample([label for label in labels if label != right], self.most - 1)
            labels = tuple(rng.sample([right, *others], self.most))
        return Question(self.text, labels, labels.index(right), row["text"])


def shape_of(rows: Sequence[Row], source: str) -> str:
    """The shape of the rows; an error, with an example, where a field is missing or senseless.

    Raises:
        ValueError: If there is no row, a row lacks a field, or an answer is none of the choices.
    """
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
        if shape == "decision" and row["label"] not in DECISIONS:
            raise ValueError(f"Expected a label of {DECISIONS}, got {row['label']!r} {where}.")
        if shape == "choices" and row["answer"] not in range(len(row["choices"])):
            raise ValueError(f"Expected as answer the index of one of {row['choices']}, got {row['answer']!r} {where}.")
        if shape == "label" and not (isinstance(row["label"], str) and row["label"].strip()):
            raise ValueError(f"Expected as label a word or words, got {row['label']!r} {where}.")
    return shape


def asked_in(row: Row, shape: str) -> str:
    """What makes a row the same question as another one: its texts; of choices of its own, the right one as well."""
    if shape == "label":
        return str(row["text"])
    parts = [row.get("context") or "", row["question"]]
    if shape != "decision":
        parts.append(row["answer"] if shape == "answer" else row["choices"][row["answer"]])
    return "\n".join(parts)


def make_questions(rows: Sequence[Row], source: str, encoder: Fits, seed: int, asking: Asking) -> list[Question]:
    """Questions from rows of any shape; what is drawn is drawn with `seed`. Those that do not fit are left out, and counted.

    Raises:
        ValueError: If a row is not right, or no question fits into the context.
    """
    shape, rng = shape_of(rows, source), random.Random(seed)
    if shape == "answer":
        return _choose_among_answers(rows, source, encoder, rng)
    return encoder.fitting([_question(row, shape, asking, rng) for row in rows], source)


def _question(row: Row, shape: str, asking: Asking, rng: random.Random) -> Question:
    if shape == "label":
        return asking.question(row, rng)
    if shape == "decision":
        return Question(row["question"], DECISIONS, DECISIONS.index(row["label"]), row["context"])
    context, per_token = row.get("context") or "", bool(row.get("per_token"))
    return Question(row["question"], tuple(row["choices"]), row["answer"], context, per_token)


def _choose_among_answers(rows: Sequence[Row], source: str, encoder: Fits, rng: random.Random) -> list[Question]:
    """Each answer among three others to the same type of question."""
    # what is too long goes before choices are drawn: otherwise most questions would go for the sake of a long rival
    alone = {Question(r["question"], (r["answer"],), 0): r for r in rows}
    rows = [alone[question] for question in encoder.fitting(list(alone), source)]
    by_type: dict[Any, list[Row]] = defaultdict(list)
    made = []
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
