"""The two ways in which a language model classifies texts: by a word that it says, or by a head."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimllm_hf.choice_accuracy import FOLDER, Question, QuestionEncoder, score_questions

from .table import load

CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


class Verbalizer:
    """Prompt-based: after text and question the model says the label's word."""

    how = "The label whose word has the highest log-likelihood is the answer"

    def __init__(self, base: str, encoder: QuestionEncoder, words: str | None = None) -> None:
        self.base, self.encoder, self.words = base, encoder, words
        self.fitting, self.collate, self.tokenizer = self.encoder.fitting, self.encoder.collate, self.encoder.tokenizer

    def prepare(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions with words in place of labels."""
        labels = sorted({choice for question in questions for choice in question.choices})
        words = verbalize(labels, self.words)
        said = [replace(q, choices=tuple(words[choice] for choice in q.choices)) for q in questions]
        return self.encoder.fitting(said, source)

    def model(self, labels: Sequence[str]) -> Any:
        """The base, to train."""
        return load(self.base)

    def example(self, question: Question) -> dict[str, Any]:
        """A training example: loss on the word."""
        return self.encoder.example(question, question.right)

    def score(self, folder: str, questions: Sequence[Question], args: TrainingArguments) -> tuple[dict[str, float], Any]:
        """Accuracy of a saved model, loaded as anybody would; nothing on other processes than the main one."""
        model = load(folder).to(args.device)
        return score_questions(model, questions, self.encoder, args.per_device_eval_batch_size), model


class Classifier:
    """A classification head on the text alone."""

    how = "The label with the highest logit is the answer"

    def __init__(self, base: str, max_length: int) -> None:
        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config = AutoConfig.from_pretrained(self.base).get_text_config()
        self.max_length = min(max_length, getattr(config, "max_position_embeddings", max_length))
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def fitting(self, questions: Sequence[Question], source: str) -> list[Question]:
        """All of them: a text that is too long loses its end."""
        return list(questions)

    def prepare(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions as they are."""
        return list(questions)

    def model(self, labels: Sequence[str]) -> Any:
        """The base with a new head, to train."""
        return AutoModelForSequenceClassification.from_pretrained(
            self.base,
            dtype=torch.float32,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def example(self, question: Question) -> dict[str, Any]:
        """A training example: the text and the number of its label."""
        ids = self.tokenizer(question.context, truncation=True, max_length=self.max_length).input_ids
        return {"input_ids": ids, "labels": sorted(question.choices).index(question.right)}

    @torch.no_grad()
    def score(self, folder: str, questions: Sequence[Question], args: TrainingArguments) -> tuple[dict[str, float], Any]:
        """As the other way to classify: each process classifies its share."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        state, size = PartialState(), args.per_device_eval_batch_size
        mine = list(range(state.process_index, len(questions), state.num_processes))
        logits: list[list[float]] = []
        for start in range(0, len(mine), size):
            batch = self.collate([self.example(questions[i]) for i in mine[start : start + size]]).to(args.device)
            batch.pop("labels")
            logits += model(**batch).logits.tolist()
        everyones = dict(gather_object(list(zip(mine, logits, strict=True))))
        if not state.is_main_process:
            return {}, model
        references = [sorted(question.choices).index(question.right) for question in questions]
        predictions = [everyones[i] for i in range(len(questions))]
        metric = evaluate.load(FOLDER, keep_in_memory=True)
        return metric.compute(predictions=predictions, references=references), model


def verbalize(labels: Sequence[str], given: str | None) -> dict[str, str]:
    """The word of each label.

    Raises:
        ValueError: If a label has no word, a word no label, or two labels have the same word.
    """
    try:
        words = {label: label for label in labels} if given is None else json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected --verbalizer as JSON, {{label: word}}, got {given!r}.") from error
    if not isinstance(words, dict) or set(words) != set(labels) or len(set(words.values())) < len(words):
        raise ValueError(f"Expected in --verbalizer a word of its own for each label of {list(labels)}, got {given}.")
    return words


def is_decoder(model: str) -> bool:
    """Whether a model is one that writes on; BERT could be made into one, and is none."""
    names = set(AutoConfig.from_pretrained(model).architectures or ())
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names & CAUSAL)


Way = Verbalizer | Classifier
