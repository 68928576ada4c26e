"""Examples to score layers by, from JSON Lines, CSV or plain text, as batches for a language model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch

PAIRS = (("prompt", "completion"), ("question", "answer"))  # the loss is on the second alone
Example = tuple[str, str]  # what the model is given, and what it is scored on


def read_examples(path: Path, limit: int) -> list[Example]:
    """The first examples of a file.

    A line of `.jsonl`, an item of a list in `.json`, or a row of `.csv` or `.tsv` (with a header row) has `text`, or
    `prompt` and `completion`, or `question` and `answer`. In plain text (`.txt`, `.md`, or no extension) a blank line ends
    an example.

    Raises:
        ValueError: If the file cannot be read, has no examples or another extension, or a row has other fields.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected a text file in UTF-8, got {path} ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ValueError(f"Expected a file with examples, got {path} ({error.strerror}).") from None
    ending = path.suffix.lower()
    if ending in (".jsonl", ".json"):
        rows = _json_rows(text)
    elif ending in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text), delimiter="," if ending == ".csv" else "\t")
        rows = [(f"line {reader.line_num}", row) for row in reader]
    elif ending not in ("", ".txt", ".md", ".text"):
        raise ValueError(f"Expected examples in a .jsonl, .json, .csv, .tsv, .txt or .md file, got {path}.")
    else:
        rows = None
    if rows is not None:
        found = [_example(row, f"{where} of {path}") for where, row in rows[:limit]]
    else:
        found = [("", part.strip()) for part in text.split("\n\n") if part.strip()][:limit]
    if not found:
        raise ValueError(f"Expected examples in {path}, got none: it is empty.")
    return found


def _json_rows(text: str) -> list[tuple[str, Any]]:
    """The lines of JSON Lines, or the items of one list; a line that is not JSON stays text."""
    try:
        if isinstance(whole := json.loads(text), list):
            return [(f"item {number}", row) for number, row in enumerate(whole)]
    except json.JSONDecodeError:
        pass  # more than one line
    return [(f"line {number}", _read(line)) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _example(row: Any, where: str) -> Example:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return "", row["text"]
        for given, scored in PAIRS:
            if isinstance(row.get(given), str) and isinstance(row.get(scored), str):
                return row[given], row[scored]
    raise ValueError(
        f'Expected "text", "prompt" and "completion", or "question" and "answer", got {str(row)[:60]!r} in {where}.'
    )


def make_batches(tokenizer: Any, examples: list[Example], max_length: int, batch_size: int) -> list[dict[str, Any]]:
    """Padded batches with labels on what is scored. Long texts are cut at the end, long prompts at the beginning.

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
