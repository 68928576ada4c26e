"""Examples to score layers by, from a text file or JSON Lines, as batches for a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PAIRS = (("prompt", "completion"), ("question", "answer"))  # the loss is on the second alone
Example = tuple[str, str]  # what the model is given, and what it is scored on


def read_examples(path: Path, limit: int) -> list[Example]:
    """The first examples of a file.

    A line of `.jsonl` has `text`, or `prompt` and `completion`, or `question` and `answer`. Any other file is plain text,
    in which a blank line ends an example.

    Raises:
        ValueError: If the file holds none, or a line is something else.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".jsonl", ".json"):
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        found = [_example(line, f"line {number} of {path}") for number, line in lines[:limit]]
    else:
        found = [("", part.strip()) for part in text.split("\n\n") if part.strip()][:limit]
    if not found:
        raise ValueError(f"Expected examples in {path}, got none: it is empty.")
    return found


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return "", row["text"]
        for given, scored in PAIRS:
            if isinstance(row.get(given), str) and isinstance(row.get(scored), str):
                return row[given], row[scored]
    raise ValueError(
        f'Expected a JSON object with "text", "prompt" and "completion", or "question" and "answer", got {line[:60]!r} in '
        f"{where}."
    )


def make_batches(tokenizer: Any, examples: list[Example], max_length: int, batch_size: int) -> list[dict[str, Any]]:
    """Padded batches with labels on what is scored. A text that is too long loses its end, a prompt its beginning.

    Raises:
        ValueError: If no example leaves a token to score.
    """
    rows = []
    for given, scored in examples:
        before = tokenizer(given).input_ids if given else tokenizer("").input_ids
        after = tokenizer(scored if not given else f" {scored}", add_special_tokens=False).input_ids[: max_length - 1]
        before = before[max(0, len(before) + len(after) - max_length) :]
        if len(before) + len(after) > 1 and after:
            rows.append((before + after, [-100] * len(before) + after))
    if not rows:
        raise ValueError(f"Expected examples of at least two tokens, got none among {len(examples)}.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = max(len(ids) for ids, _ in part)
        batches.append(
            {
                "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in part]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in part]),
                "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in part]),
            }
        )
    return batches
