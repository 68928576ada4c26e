"""Exact match: whether a model writes the right answer by itself, where answers are short."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trimllm_hf.choice_accuracy import Question, QuestionEncoder

FOLDER = str(Path(__file__).parent / "exact_match")
SHORT = 16  # tokens, the end included


def answer_tokens(questions: Sequence[Question], encoder: QuestionEncoder) -> int:
    """Tokens of the longest choice, with the end of text."""
    choices = {choice for question in questions for choice in question.choices}
    return max(len(encoder.tokenizer(f" {choice}", add_special_tokens=False).input_ids) for choice in choices) + 1


def short_answers(questions: Sequence[Question], encoder: QuestionEncoder) -> bool:
    """Whether the task has answers that can be written word by word and compared."""
    return not any(question.per_token for question in questions) and answer_tokens(questions, encoder) <= SHORT


def exact_match(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> dict[str, float]:
    """Share of the questions to which the greedily written text is the right choice; each process does its share.

    Args:
        model: A causal language model, whole on each process.
        questions: The questions, the same on each process.
        encoder: Their encoder.
        batch_size: Questions a batch, on each process.

    Returns:
        `exact_match` and `exact_match_error` (one standard error) on the main process; nothing on the others.
    """
    state = PartialState()
    share = range(state.process_index, len(questions), state.num_processes)
    mine = list(zip(share, write(model, [questions[i] for i in share], encoder, batch_size), strict=True))
    everyones = dict(gather_object(mine))
    if not state.is_main_process:
        return {}
    metric = evaluate.load(FOLDER, keep_in_memory=True)
    predictions = [everyones[i] for i in range(len(questions))]
    found = metric.compute(predictions=predictions, references=[question.right for question in questions])
    return {"exact_match": found["exact_match"], "exact_match_error": found["standard_error"]}


@torch.no_grad()
def write(model: Any, questions: Sequence[Question], encoder: QuestionEncoder, batch_size: int) -> list[str]:
    """What the model writes after each question, greedily, as far as the longest choice would reach."""
    if not questions:
        return []
    new_tokens, pad = answer_tokens(questions, encoder), encoder.tokenizer.pad_token_id
    prompts = [encoder.prompt(question) for question in questions]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device)
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad)
        texts = encoder.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        written.update(zip(chosen, texts, strict=True))
    return [written[i] for i in range(len(prompts))]
