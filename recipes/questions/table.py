"""What fine-tuning and trimming did: every model scored and timed in the same way, as a table."""

import json
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from transformers import AutoModelForCausalLM, TrainingArguments

from trimllm_hf.choice_accuracy import Question, QuestionEncoder, log_likelihoods, score_questions

from .general_text import general_loss, read_pieces
from .generation import exact_match, short_answers

Row = dict[str, Any]


@dataclass(frozen=True)
class Tests:
    """What every model is tested on.

    Attributes:
        questions: Those of the domain.
        encoder: Their encoder.
        off_domain: Questions of other domains, if any.
        general_file: A text outside the domain, if any.
    """

    questions: Sequence[Question]
    encoder: QuestionEncoder
    off_domain: Sequence[Question] = field(default=())
    general_file: str | None = None

    def score(self, model: Any, batch_size: int) -> Row:
        """Accuracy, in the domain and outside it, and exact match; on the main process, nothing on the others."""
        scores: Row = score_questions(model, self.questions, self.encoder, batch_size)
        if short_answers(self.questions, self.encoder):
            scores |= exact_match(model, self.questions, self.encoder, batch_size)
        if self.off_domain:
            outside = score_questions(model, self.off_domain, self.encoder, batch_size)
            scores |= {f"off_domain_{name}": value for name, value in outside.items()}
        return scores


def load(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, by stock transformers."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def compare(models: Mapping[str, str], tests: Tests, args: TrainingArguments) -> list[Row]:
    """Load each model as anybody would, score and time it, print the table, and let the last one answer a question.

    Returns:
        A row a model, which `results.json` in the output folder holds as well; none on other processes than the main one.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    loaded = [load(path, dtype).to(args.device).eval() for path in models.values()]
    scores = [tests.score(model, args.per_device_eval_batch_size) for model in loaded]
    rows: list[Row] = []
    if args.process_index == 0:
        prompt = tests.encoder.prompt(tests.questions[0])
        times = ms_per_token(loaded, prompt[-max(1, tests.encoder.max_length - 32) :])
        rows = [
            {
                "model": name,
                "layers": model.config.get_text_config().num_hidden_layers,
                **score,
                "parameters": model.num_parameters(),
                "ms_per_token": ms,
            }
            for name, model, score, ms in zip(models, loaded, scores, times, strict=True)
        ]
        if tests.general_file is not None:
            pieces = read_pieces(tests.general_file, tests.encoder)
            for row, model in zip(rows, loaded, strict=True):
                row |= general_loss(model, pieces, tests.encoder, args.per_device_eval_batch_size) | {"pieces": len(pieces)}
        save(rows, args)
        show(rows, tests.questions)
        answer(loaded[-1], tests.questions[0], tests.encoder)
    wait_for_everyone()
    return rows


def ms_per_token(models: Sequence[Any], prompt: list[int], new_tokens: int = 32, rounds: int = 7) -> list[float]:
    """Median time of a greedily generated token at batch size 1, the models in turn so that drift meets them all."""
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, of_model in zip(models, times, strict=True):
            ids = torch.tensor([prompt], device=model.device)
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            ).tolist()  # waits for the device
            if number:  # the first round warms up
                of_model.append(1000 * (time.perf_counter() - start) / new_tokens)
    return [statistics.median(of_model) for of_model in times]


def save(rows: Sequence[Row], args: TrainingArguments) -> None:
    """Write the rows into the output folder."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.output_dir) / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def show(rows: Sequence[Row], questions: Sequence[Question], depth: str = "layers") -> None:
    """Print the table, and what always the same answer would reach.

    ± is one standard error (of the loss: half of its 95% interval).
    """
    columns = {
        "model": lambda row: row["model"],
        depth: lambda row: row["layers"],
        "accuracy": lambda row: f"{row['accuracy']:.3f} ± {row['standard_error']:.3f} (n={row['questions']})",
        "exact match": lambda row: f"{row['exact_match']:.3f} ± {row['exact_match_error']:.3f}",
        "off-domain accuracy": lambda row: (
            f"{row['off_domain_accuracy']:.3f} ± {row['off_domain_standard_error']:.3f} (n={row['off_domain_questions']})"
        ),
        "general loss": lambda row: f"{row['loss']:.3f} ± {row['half_width']:.3f}",
        "parameters": lambda row: f"{row['parameters']:,}",
        "ms per token": lambda row: f"{row['ms_per_token']:.2f}",
        "training seconds": lambda row: f"{row['seconds']:.1f}",
    }
    needs = {"exact match": "exact_match", "off-domain accuracy": "off_domain_accuracy", "general loss": "loss"}
    needs |= {"model": "model", "ms per token": "ms_per_token", "training seconds": "seconds"}
    shown = [name for name in columns if name not in needs or needs[name] in rows[0]]
    lines = [shown, *([str(columns[name](row)) for name in shown] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    print()
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    if len({frozenset(question.choices) for question in questions}) == 1:
        commonest, count = Counter(question.right for question in questions).most_common(1)[0]
        print(f"Always to answer {commonest!r} would be right in {count / len(questions):.3f}.")


def answer(model: Any, question: Question, encoder: QuestionEncoder) -> None:
    """Print a question, the choice of the highest log-likelihood, and what the model writes by itself."""
    examples = [encoder.example(question, choice) for choice in question.choices]
    scores = [
        total / length if question.per_token else total
        for total, length in log_likelihoods(model, examples, encoder, len(examples))
    ]
    prompt = torch.tensor([encoder.prompt(question)], device=model.device)
    room = encoder.max_length - prompt.shape[1]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=min(48, room))
    if question.context:
        print(f"\n{textwrap.shorten(question.context, 240)}")
    print(f"\nQuestion: {question.text}")
    for choice, score in zip(question.choices, scores, strict=True):
        marks = "  <- chosen" * (score == max(scores)) + "  (right)" * (choice == question.right)
        print(f"  {score:9.3f}  {textwrap.shorten(choice, 80)}{marks}")
    print("Generated:", encoder.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip())
