"""The domains: from rows of data to questions, and to the examples that a model trains and is tested on."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from pretrain import HELD_OUT
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))

from questions.choice_accuracy import Question, QuestionEncoder, log_likelihoods
from questions.data import Split
from questions.data import make_questions as ask

DOMAINS = {  # folder, test split, field of the text, field of the label, the question
    "medical": ("medquad", "test", "answer", "qtype", "What is this about?"),
    "legal": ("cuad_clauses", "test", "text", "label", "What kind of clause is this?"),
    "finance": ("twitter_financial_news", "valid", "text", "label", "Is this bearish, bullish or neutral?"),
    "answers": ("medquad", "test", "answer", "qtype", ""),  # each row has its question
    "writing": ("medquad", "test", "answer", "qtype", ""),
}

Example = dict[str, list[int]]


@cache
def load_encoder(base: Path, max_length: int) -> QuestionEncoder:
    """The base's encoder, which keeps what it has encoded: once for all runs of a process."""
    return QuestionEncoder(AutoTokenizer.from_pretrained(base), max_length)


def read(args: argparse.Namespace, split: str) -> list[dict[str, str]]:
    """The rows of a split; where a passage is read or chosen, it is cut to the first words."""
    folder, _, text, label, _ = DOMAINS[args.domain]
    with (args.data / folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    words = None if args.domain == "writing" else args.words
    return [{**row, text: " ".join(row[text].split()[:words]), label: row[label].lower()} for row in rows]


def make_questions(args: argparse.Namespace, encoder: QuestionEncoder) -> tuple[list[Question], list[Question]]:
    """Questions to train and to test on, in the order of the seed; no passage is in both."""
    _, test, text, label, asked = DOMAINS[args.domain]
    rows = {split: read(args, split) for split in ("train", test)}
    labels = tuple(label for label, _ in Counter(row[label] for row in rows["train"]).most_common(args.labels))
    held_out = {row[text] for row in rows[test]}
    made = []
    for split, of_split in rows.items():
        kept = [row for row in of_split if split == test or row[text] not in held_out]
        if asked:
            pairs = sorted({(row[text], row[label]) for row in kept if row[label] in labels})
            random.Random(args.seed).shuffle(pairs)
            made.append([Question(asked, labels, labels.index(right), context=passage) for passage, right in pairs])
            continue
        random.Random(args.seed).shuffle(kept)
        if args.domain == "answers":
            made.append(ask(Split(kept, split), encoder, args.seed))
        else:
            written = [Question(row["question"], (row[text],), 0) for row in kept]
            made.append([question for question in written if len(encoder.prompt(question)) <= encoder.max_length // 2])
    return made[0], made[1][: args.questions]


def examples(questions: list[Question], encoder: QuestionEncoder) -> list[Example]:
    """Each question with its right answer, cut to the context; only the answer has labels."""
    whole = [encoder.example(question, question.right) for question in questions]
    return [{name: ids[: encoder.max_length] for name, ids in example.items()} for example in whole]


def pieces_of_book(data: Path, encoder: QuestionEncoder, pieces: int) -> list[Example]:
    """Pieces of a book, each as long as the context; a base of `pretrain.py` has not read it."""
    length = encoder.max_length
    ids = encoder.tokenizer((data / "general_books" / HELD_OUT).read_text(encoding="utf-8"), verbose=False).input_ids
    cut = [ids[start : start + length] for start in range(0, pieces * length, length)]
    return [{"input_ids": piece, "labels": piece} for piece in cut]


def loss_per_token(model: Any, pieces: list[Example], encoder: QuestionEncoder, batch_size: int) -> float:
    """Mean loss of a model over all labelled tokens, in nats."""
    scores = log_likelihoods(model, pieces, encoder, batch_size)
    return -sum(total for total, _ in scores) / sum(tokens for _, tokens in scores)
