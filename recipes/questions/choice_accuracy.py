"""Multiple choice by log-likelihood: questions, how a model reads them, and its accuracy.

`evaluate.load("recipes/questions/choice_accuracy.py")` gives the metric, with "exact_match" as second argument that of
written answers. `evaluate` runs a copy of this file, which therefore imports one module a line, and none beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import DataCollatorForSeq2Seq
from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")

PROMPT = "Question: {question}\nAnswer:"
SHORT = 16  # tokens, the end of text included: longer answers are not compared word by word
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""  # what the model reads before the question
    per_token: bool = False  # compare choices by log-likelihood per token, as sentences of different lengths are

    @property
    def right(self) -> str:
        """The right choice."""
        return self.choices[self.answer]


class QuestionEncoder:
    """Turns questions into the inputs of a model: context, prompt, choice, end of text; labels on the choice only.

    An input has `max_length` tokens at most: a context that is too long loses its beginning. In `prompt`, the text between
    context and choice, `{question}` stands for the question.
    """

    def __init__(self, tokenizer: Any, max_length: int, prompt: str = PROMPT) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"Expected a tokenizer with an eos_token, which ends an answer, got none in {tokenizer!r}.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.tokenizer, self.max_length, self.template = tokenizer, max_length, prompt
        self.collate = DataCollatorForSeq2Seq(tokenizer)
        self._start: list[int] = tokenizer("").input_ids  # what the tokenizer begins every text with
        # cached: a choice stands in many questions. Not verbose: a text longer than the context is handled here
        self._ids = cache(lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def room(self, question: Question) -> int:
        """Number of tokens that prompt and longest choice leave for the context; negative if they do not fit."""
        longest = max(len(self.answer(choice)) for choice in question.choices)
        return self.max_length - len(self._start) - len(self._asked(question)) - longest

    def prompt(self, question: Question) -> list[int]:
        """Token ids of everything before the choice: the same for all choices of a question."""
        context = self._ids(f"{question.context}\n") if question.context else []
        return [*self._start, *context[max(0, len(context) - self.room(question)) :], *self._asked(question)]

    def answer(self, choice: str) -> list[int]:
        """Token ids of a choice, with the end of text."""
        return [*self._ids(f" {choice}"), self.tokenizer.eos_token_id]

    def example(self, question: Question, choice: str) -> Example:
        """`input_ids` and `labels` of a question with one of its choices."""
        prompt, answer = self.prompt(question), self.answer(choice)
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def rows(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Every choice of every question: a `calibration_dataset` for `scan_metric="choice_accuracy"`."""
        return [
            self.example(question, choice)
            | {"question": number, "right": int(choice == question.right), "per_token": int(question.per_token)}
            for number, question in enumerate(questions)
            for choice in question.choices
        ]

    def fitting(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions that fit, in order; the number of the others is logged. If none fits, a ValueError."""
        kept = [question for question in questions if self.room(question) >= 0]
        if not kept:
            need = min(self.max_length - self.room(question) for question in questions)
            raise ValueError(
                f"Expected questions whose choices fit in {self.max_length} tokens, got none among {len(questions)} of "
                f"{source}: the shortest needs {need}. Raise max_length or take a model with a longer context."
            )
        if others := len(questions) - len(kept):
            all_, most = len(questions), self.max_length
            logger.warning(f"{source}: left out {others} of {all_} questions, which do not fit in {most} tokens.")
        return kept

    def _asked(self, question: Question) -> list[int]:
        return list(self._ids(self.template.format(question=question.text)))


# ---- scores of a causal language model, which every process holds whole: each does its share of the questions


def gather(work: Callable[[list[Any]], Sequence[Any]], items: Sequence[Any]) -> list[Any] | None:
    """What `work` makes of the items, each process having done its share; None on other processes than the main one."""
    with PartialState().split_between_processes(list(items)) as mine:
        found: list[Any] = gather_object(list(work(mine)))
    return found if PartialState().is_main_process else None


def score_questions(
    model: nn.Module, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int
) -> dict[str, float]:
    """`accuracy`, `standard_error` and the number of `questions`, on the main process; nothing on the others."""

    def of_choices(part: list[Question]) -> list[list[tuple[float, int]]]:
        examples = [encoder.example(question, choice) for question in part for choice in question.choices]
        scores = iter(log_likelihoods(model, examples, encoder, batch_size))
        return [[next(scores) for _ in question.choices] for question in part]

    if (found := gather(of_choices, questions)) is None:
        return {}
    result: dict[str, float] = evaluate.load(__file__, keep_in_memory=True).compute(  # in memory: no lock file to wait for
        predictions=[[total for total, _ in scores] for scores in found],
        references=[question.answer for question in questions],
        lengths=[[n if q.per_token else 1 for _, n in scores] for q, scores in zip(questions, found, strict=True)],
    )
    return result


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, examples: Sequence[Example], encoder: QuestionEncoder, batch_size: int
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


def answer_tokens(questions: Sequence[Question], encoder: QuestionEncoder) -> int:
    """Number of tokens of the longest choice, with the end of text."""
    return max(len(encoder.answer(choice)) for choice in {choice for q in questions for choice in q.choices})


def short_answers(questions: Sequence[Question], encoder: QuestionEncoder) -> bool:
    """Whether the answers are short enough to be written by the model and compared word by word."""
    return not any(question.per_token for question in questions) and answer_tokens(questions, encoder) <= SHORT


def exact_match(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> dict[str, float]:
    """Share of the questions to which the greedily generated text is the right choice, on the main process."""
    if (written := gather(lambda part: write(model, part, encoder, batch_size), questions)) is None:
        return {}
    metric = evaluate.load(__file__, "exact_match", keep_in_memory=True)
    found = metric.compute(predictions=written, references=[question.right for question in questions])
    return {"exact_match": found["exact_match"], "exact_match_error": found["standard_error"]}


@torch.no_grad()
def write(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> list[str]:
    """What the model generates after each question, greedily, up to the length of the longest choice."""
    tokenizer, prompts = encoder.tokenizer, [encoder.prompt(question) for question in questions]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        settings = {"max_new_tokens": answer_tokens(questions, encoder), "pad_token_id": tokenizer.pad_token_id}
        made = model.generate(**batch.to(model.device), do_sample=False, **settings)
        texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        written.update(zip(chosen, texts, strict=True))
    return [written[i] for i in range(len(prompts))]


class ChoiceAccuracy(evaluate.Metric):
    """Accuracy: by the highest log-likelihood (the protocol of TrimLLM, arXiv 2412.11242), or of written answers.

    `predictions` are the log-likelihoods of each question's choices, `references` the index of the right one, `lengths` what
    to divide them by, if anything. "exact_match" takes texts; letter case and white space make no difference.
    """

    def _info(self) -> evaluate.MetricInfo:
        text, numbers = datasets.Value("string"), datasets.Sequence(datasets.Value("float64"))
        features = {"predictions": numbers, "references": datasets.Value("int64")}
        if self.config_name == "exact_match":
            features = {"predictions": text, "references": text}
        described = {"description": type(self).__doc__, "citation": "", "inputs_description": type(self).__doc__}
        return evaluate.MetricInfo(**described, features=datasets.Features(features))

    def _compute(
        self, predictions: list[Any], references: list[Any], lengths: list[list[int]] | None = None
    ) -> dict[str, float]:
        if not references:
            raise ValueError("Expected at least one question, got none.")
        if self.config_name == "exact_match":
            pairs = zip(predictions, references, strict=True)
            share = sum(a.casefold().split() == b.casefold().split() for a, b in pairs) / len(references)
            return {"exact_match": share, "standard_error": math.sqrt(share * (1 - share) / len(references))}
        lengths = [[1] * len(scores) for scores in predictions] if lengths is None else lengths
        if len(lengths) != len(predictions):
            raise ValueError(f"Expected lengths for {len(predictions)} questions, got them for {len(lengths)}.")
        right = 0
        for number, (scores, reference, sizes) in enumerate(zip(predictions, references, lengths, strict=True)):
            if len(scores) != len(sizes) or len(scores) < 2 or min(sizes) <= 0 or not 0 <= reference < len(scores):
                expected = "two choices a question or more, a length above 0 for each, and the index of one as reference"
            elif any(math.isnan(score) for score in scores):
                expected = "numbers as log-likelihoods (a model that gives NaN has no answer: look at its training loss)"
            else:
                values = [score / size for score, size in zip(scores, sizes, strict=True)]
                right += values.index(max(values)) == reference  # of equal ones the first counts
                continue
            got = f"log-likelihoods {scores}, lengths {list(sizes)} and reference {reference} for question {number}"
            raise ValueError(f"Expected {expected}, got {got}.")
        share = right / len(references)
        error = math.sqrt(share * (1 - share) / len(references))
        return {"accuracy": share, "standard_error": error, "questions": len(references)}
