"""What fine-tuning and trimming did: every model scored in the same way, as a table and for the card."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from questions.choice_accuracy import Question, QuestionEncoder, exact_match, log_likelihoods, score_questions, write
from questions.data import DataArguments, Row

from trimllm_hf import TrimCardData
from trimllm_hf.publish.card_data import DataUse, Quality, Score

Questions = Mapping[str, Sequence[Question]]  # by split
CHOSEN = "Choices a question: {:.3g} on average. The choice with the highest log-likelihood{} is the answer"
WRITTEN = "Greedily generated, as far as the longest choice; letter case and white space aside"


def score(model: Any, tests: Questions, encoder: QuestionEncoder, size: int, text: str | None) -> Row:
    """Accuracy on the questions "test" and "off_domain", exact match, loss on a text file; on the main process only."""
    row: Row = score_questions(model, tests["test"], encoder, size) | exact_match(model, tests["test"], encoder, size)
    if tests.get("off_domain"):
        outside = score_questions(model, tests["off_domain"], encoder, size)
        row |= {f"off_domain_{name}": value for name, value in outside.items()}
    return row | general_loss(model, read_pieces(text, encoder), encoder, size) if row and text else row


def read_pieces(path: str, encoder: QuestionEncoder, most: int = 200) -> list[dict[str, list[int]]]:
    """A text file in pieces (between `<|endoftext|>` if it has that, else between empty lines), cut to the context."""
    text = Path(path).read_text(encoding="utf-8")
    pieces = text.split("<|endoftext|>" if "<|endoftext|>" in text else "\n\n")
    cut: dict[str, Any] = {"truncation": True, "max_length": encoder.max_length}
    ids = [encoder.tokenizer(piece.strip(), **cut).input_ids for piece in pieces if piece.strip()]
    if not (long_enough := [piece for piece in ids if len(piece) > 1][:most]):
        raise ValueError(f"Expected text in {path}, got none of at least two tokens.")
    return [{"input_ids": piece, "labels": piece} for piece in long_enough]


def general_loss(model: Any, pieces: list[dict[str, list[int]]], encoder: QuestionEncoder, size: int) -> Row:
    """Loss per token, and half the width of its 95% interval: of a ratio of sums over pieces (Cochran 1977, §6.4)."""
    scores = log_likelihoods(model, pieces, encoder, size)
    tokens = sum(length for _, length in scores)
    loss = -sum(total for total, _ in scores) / tokens
    deviations = sum((-total - loss * length) ** 2 for total, length in scores)
    half_width = 1.96 * sqrt(deviations * len(scores) / max(1, len(scores) - 1)) / tokens
    return {"loss": loss, "half_width": half_width, "pieces": len(scores)}


def show(rows: Sequence[Row], questions: Sequence[Question], folder: str, depth: str = "layers") -> None:
    """Print the table, ± one standard error (of the loss: half of its 95% interval); write `results.json` in the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    off_domain = "{off_domain_accuracy:.3f} ± {off_domain_standard_error:.3f} (n={off_domain_questions})"
    columns = {  # its name: a cell of it, and the field without which it is left out
        "model": ("{model}", "model"),
        depth: ("{layers}", "layers"),
        "accuracy": ("{accuracy:.3f} ± {standard_error:.3f} (n={questions})", "accuracy"),
        "exact match": ("{exact_match:.3f} ± {exact_match_error:.3f}", "exact_match"),
        "off-domain accuracy": (off_domain, "off_domain_accuracy"),
        "general loss": ("{loss:.3f} ± {half_width:.3f}", "loss"),
        "parameters": ("{parameters:,}", "parameters"),
        "ms per token": ("{ms_per_token:.2f}", "ms_per_token"),
        "training seconds": ("{seconds:.1f}", "seconds"),
    }
    shown = {name: cell for name, (cell, needs) in columns.items() if needs in rows[0]}
    lines = [list(shown), *([cell.format(**row) for cell in shown.values()] for row in rows)]
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
    found = log_likelihoods(model, examples, encoder, len(examples))
    scores = [total / length if question.per_token else total for total, length in found]
    print(f"\n{textwrap.shorten(question.context, 240)}\n\nQuestion: {question.text}")
    for choice, value in zip(question.choices, scores, strict=True):
        marks = "  <- chosen" * (value == max(scores)) + "  (right)" * (choice == question.right)
        print(f"  {value:9.3f}  {textwrap.shorten(choice, 80)}{marks}")
    print("Generated:", *write(model, [question], encoder, 1))


def describe(
    card: TrimCardData, rows: Mapping[str, Row], recipe: DataArguments, questions: Questions, note: str | None = None
) -> None:
    """Fill in a card's data and quality from the table's rows: "trimmed", and "base" and "full" where there are such."""
    test, trimmed, hub = questions["test"], rows["trimmed"], {}
    given = recipe.test_file or recipe.validation_file
    files = [short(recipe.train_file), short(given or recipe.train_file)]
    if not any(files):
        files, hub = [recipe.dataset_name] * 2, {"dataset_id": recipe.dataset_name, "revision": recipe.dataset_revision}
    held_out = None if given or hub else "Held out of the training file by the recipe's seed"
    training = DataUse("training", files[0], len(questions["train"]), **hub, note=note)
    card.data = [training, DataUse("test", files[1], len(test), **hub, note=held_out)]

    def quality(metric: str, n: int, name: str = "accuracy", **more: Any) -> Quality:
        return Quality(name, **{of: Score.of_share(row[metric], n) for of, row in rows.items()}, n=n, **more)

    on_test = {"dataset": files[1], "split": "held out", "interval": "95%, Wilson", **hub}
    chosen = CHOSEN.format(sum(len(q.choices) for q in test) / len(test), " per token" * test[0].per_token)
    card.quality = [quality("accuracy", len(test), **on_test, note=chosen)]
    if "exact_match" in trimmed:
        card.quality.append(quality("exact_match", len(test), "exact_match", **on_test, note=WRITTEN))
    card.outside = []
    if n := trimmed.get("off_domain_questions"):
        where = {"dataset": ", ".join(map(short, recipe.off_domain_file)), "split": "a draw", "interval": "95%, Wilson"}
        card.outside.append(quality("off_domain_accuracy", n, **where))
    if "loss" in trimmed:
        scores = {of: Score(x := row["loss"], x - row["half_width"], x + row["half_width"]) for of, row in rows.items()}
        where = {"dataset": short(recipe.general_file), "split": "its first pieces", "n": trimmed["pieces"]}
        how = {"interval": "95%, a piece being one observation", "note": "Per token; lower is better"}
        card.outside.append(Quality("loss", **scores, **where, **how))


def short(path: str | None) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path or "").parts[-2:])
