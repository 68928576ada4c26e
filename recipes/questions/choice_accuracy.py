"""Multiple-choice questions for a causal language model: to token ids, to log-likelihoods, to an accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import DataCollatorForSeq2Seq
from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")

FOLDER = str(Path(__file__).parent)  # for evaluate.load: the metric is choice_accuracy.py beside this file


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        text: The question.
        choices: What it can be answered with.
        answer: Index of the right choice.
        context: What is to be read before answering.
        per_token: Whether choices are compared by log-likelihood per token, as whole answers of different lengths are.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""
    per_token: bool = False

    @property
    def right(self) -> str:
        """The right choice."""
        return self.choices[self.answer]


class QuestionEncoder:
    """Turns questions into the inputs of a model: context, question, choice, end of text; labels on the choice only.

    Args:
        tokenizer: The model's tokenizer. Without a padding token it gets its end-of-text token as one.
        max_length: Tokens of an input at most. A context that is too long loses its beginning, an answer never anything.

    Raises:
        ValueError: If the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"Expected a tokenizer with an eos_token, which ends an answer, got none in {tokenizer!r}.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.collate = DataCollatorForSeq2Seq(tokenizer)
        self._start: list[int] = tokenizer("").input_ids  # what the tokenizer begins every text with
        # choices stand in many questions; a text longer than the context is noticed here, not by a warning there
        self._ids = cache(lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def room(self, question: Question) -> int:
        """Tokens that question and longest choice leave for the context; below 0 they do not fit."""
        longest = max(len(self._answer(choice)) for choice in question.choices)
        return self.max_length - len(self._start) - len(self._asked(question)) - longest

    def prompt(self, question: Question) -> list[int]:
        """Token ids of everything before the choice: the same for all choices of a question."""
        context = self._ids(f"{question.context}\n") if question.context else []
        return [*self._start, *context[max(0, len(context) - self.room(question)) :], *self._asked(question)]

    def example(self, question: Question, choice: str) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a question with one of its choices."""
        prompt, answer = self.prompt(question), self._answer(choice)
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def rows(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Every choice of every question as a row, to scan a model's layers by the accuracy (`scan_metric`).

        Beside `input_ids` and `labels` a row says which `question` it belongs to, whether its choice is the `right` one,
        and whether choices are compared `per_token`. Give them as `calibration_dataset`.
        """
        return [
            {
                **self.example(question, choice),
                "question": number,
                "right": int(choice == question.right),
                "per_token": int(question.per_token),
            }
            for number, question in enumerate(questions)
            for choice in question.choices
        ]

    def fitting(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions that fit, in their order; the number of the others is logged.

        Raises:
            ValueError: If none fits.
        """
        kept = [question for question in questions if self.room(question) >= 0]
        if not kept:
            need = min(self.max_length - self.room(question) for question in questions)
            raise ValueError(
                f"Expected questions whose choices fit in {self.max_length} tokens, got none among {len(questions)} of "
                f"{source}: the shortest needs {need}. Raise max_length or take a model with a longer context."
            )
        if len(kept) < len(questions):
            logger.warning(
                f"{source}: left out {len(questions) - len(kept)} of {len(questions)} questions, which do not fit in "
                f"{self.max_length} tokens."
            )
        return kept

    def _asked(self, question: Question) -> list[int]:
        return list(self._ids(f"Question: {question.text}\nAnswer:"))

    def _answer(self, choice: str) -> list[int]:
        return [*self._ids(f" {choice}"), self.tokenizer.eos_token_id]


def score_questions(
    model: nn.Module, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int
) -> dict[str, float]:
    """Accuracy of a model on questions: its answer is the choice to which it gives the highest log-likelihood.

    With several processes, each of which holds the whole model, each scores its share of the questions.

    Args:
        model: A causal language model, on the device that it is to run on. It is left in evaluation mode.
        questions: The questions, the same on each process.
        encoder: Their encoder.
        batch_size: Choices a batch, on each process.

    Returns:
        `accuracy`, `standard_error` and `questions` (their number) on the main process; nothing on the others.

    Raises:
        ValueError: If there is no question, or the model gives NaN.
    """
    state = PartialState()
    share = range(state.process_index, len(questions), state.num_processes)
    examples = [encoder.example(questions[i], choice) for i in share for choice in questions[i].choices]
    scores = iter(log_likelihoods(model, examples, encoder, batch_size))
    mine = [(i, [next(scores) for _ in questions[i].choices]) for i in share]
    everyones = dict(gather_object(mine))
    if not state.is_main_process:
        return {}
    # in memory: no lock file, so that concurrent runs do not wait for each other
    metric = evaluate.load(FOLDER, keep_in_memory=True)
    result: dict[str, float] = metric.compute(
        predictions=[[total for total, _ in everyones[i]] for i in range(len(questions))],
        references=[question.answer for question in questions],
        lengths=[
            [length if question.per_token else 1 for _, length in everyones[i]] for i, question in enumerate(questions)
        ],
    )
    return result


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, examples: Sequence[dict[str, list[int]]], encoder: QuestionEncoder, batch_size: int
) -> list[tuple[float, int]]:
    """For each example the summed log-likelihood (natural log) of its labelled tokens, and their number."""
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found: dict[int, tuple[float, int]] = {}
    for start in range(0, len(examples), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = encoder.collate([examples[i] for i in chosen]).to(device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].transpose(1, 2).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        totals, lengths = -losses.sum(dim=1), (labels != -100).sum(dim=1)
        found.update(zip(chosen, zip(totals.tolist(), lengths.tolist(), strict=True), strict=True))
    return [found[i] for i in range(len(examples))]
