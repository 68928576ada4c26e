"""Multiple choice by log-likelihood: questions, how a model reads them, and its accuracy.

`evaluate.load("recipes/questions/choice_accuracy.py")` gives the metric. `evaluate` runs a copy of this file, which
therefore imports one module a line, and none beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
Work = Callable[[list[Any]], Sequence[Any]]


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
    """Makes inputs of questions, of at most `max_length` tokens: context, prompt, choice, end of text; labels on the choice.

    A context that is too long loses its beginning. In the prompt `{question}` stands for the question.
    """

    def __init__(self, tokenizer: Any, max_length: int, prompt: str = PROMPT) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"Expected a tokenizer with an eos_token, which ends an answer, got none in {tokenizer!r}.")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.tokenizer, self.max_length, self.template = tokenizer, max_length, prompt
        self.collate = DataCollatorForSeq2Seq(tokenizer)
        self._start: list[int] = tokenizer("").input_ids  # what the tokenizer begins every text with
        # cached: a choice stands in many questions. Not verbose: a text longer than the context is handled here
        self._ids = cache(lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def room(self, question: Question) -> int:
        """Number of tokens that prompt and longest choice leave for the context; negative if they do not fit."""
        return self.max_length - len(self.prompt(replace(question, context=""))) - self.longest([question])

    def longest(self, questions: Sequence[Question]) -> int:
        """Number of tokens of the longest choice, with the end of text."""
        return max(len(self.answer(choice)) for choice in {choice for q in questions for choice in q.choices})

    def prompt(self, question: Question) -> list[int]:
        """Token ids of everything before the choice: the same for all choices of a question."""
        context = self._ids(f"{question.context}\n") if question.context else []
        cut = max(0, len(context) - self.room(question)) if context else 0
        return [*self._start, *context[cut:], *self._ids(self.template.format(question=question.text))]

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
            logger.warning(f"{source}: left out {others} questions, which do not fit in {self.max_length} tokens.")
        return kept


def gather(work: Work, items: Sequence[Any]) -> list[Any] | None:
    """What `work` makes of the items, each process having done its share; None on other processes than the main one."""
    with PartialState().split_between_processes(list(items)) as mine:
        found: list[Any] = gather_object(list(work(mine)))
    return found if PartialState().is_main_process else None


def by_length(work: Work, items: Sequence[Any], lengths: Sequence[int], batch_size: int) -> list[Any]:
    """What `work` makes of the items in batches: those of about the same length together, so that little is padded."""
    order, found = sorted(range(len(items)), key=lengths.__getitem__), {}
    for start in range(0, len(items), batch_size):
        chosen = order[start : start + batch_size]
        found.update(zip(chosen, work([items[i] for i in chosen]), strict=True))
    return [found[i] for i in range(len(items))]


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

    def score(chosen: list[Example]) -> list[tuple[float, int]]:
        batch = encoder.collate(chosen).to(next(model.parameters()).device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].transpose(1, 2).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        return list(zip((-losses.sum(dim=1)).tolist(), (labels != -100).sum(dim=1).tolist(), strict=True))

    return by_length(score, examples, [len(example["input_ids"]) for example in examples], batch_size)


def exact_match(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> dict[str, float]:
    """Share of the questions to which the model writes the right choice, on the main process; nothing of long choices."""
    long = any(question.per_token for question in questions) or encoder.longest(questions) > SHORT
    if long or (written := gather(lambda part: write(model, part, encoder, batch_size), questions)) is None:
        return {}
    pairs = zip(written, questions, strict=True)
    share = sum(text.casefold().split() == q.right.casefold().split() for text, q in pairs) / len(questions)
    return {"exact_match": share, "exact_match_error": math.sqrt(share * (1 - share) / len(questions))}


@torch.no_grad()
def write(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> list[str]:
    """What the model generates after each question, greedily, up to the length of the longest choice."""
    tokenizer, prompts = encoder.tokenizer, [encoder.prompt(question) for question in questions]
    settings = {"max_new_tokens": encoder.longest(questions), "pad_token_id": tokenizer.pad_token_id}

    def generate(chosen: list[list[int]]) -> list[str]:
        batch = tokenizer.pad({"input_ids": chosen}, padding_side="left", return_tensors="pt").to(model.device)
        made = model.generate(**batch, do_sample=False, **settings)
        return list(tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    return by_length(generate, prompts, list(map(len, prompts)), batch_size)


class ChoiceAccuracy(evaluate.Metric):
    """Accuracy by the highest log-likelihood: the protocol of TrimLLM (arXiv 2412.11242).

    `predictions` are those of each question's choices, `references` the index of the right one, `lengths` their divisors.
    """

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("float64"))
        features = datasets.Features({"predictions": numbers, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[Any], references: list[int], lengths: Any = None) -> dict[str, float]:
        if not references:
            raise ValueError("Expected at least one question, got none.")
        lengths = [[1] * len(scores) for scores in predictions] if lengths is None else lengths
        right = 0
        for number, (scores, reference, sizes) in enumerate(zip(predictions, references, lengths, strict=True)):
            fits = len(scores) == len(sizes) and 0 <= reference < len(scores) >= 2 and min(sizes) > 0
            if not fits or any(map(math.isnan, scores)):
                raise ValueError(
                    "Expected two choices a question or more, numbers as log-likelihoods (a model that gives NaN has no "
                    "answer: look at its training loss), a length above 0 for each, and the index of one as reference, got "
                    f"log-likelihoods {scores}, lengths {list(sizes)} and reference {reference} for question {number}."
                )
            values = [score / size for score, size in zip(scores, sizes, strict=True)]
            right += values.index(max(values)) == reference  # of equal ones the first counts
        share, number = right / len(references), len(references)
        return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / number), "questions": number}
