"""Rows, as they stand in a file or on the Hub."""

import csv
import json
from pathlib import Path
from typing import Any

from datasets import ClassLabel, load_dataset

from trimllm_hf.training.run_summary import source_of

from .settings import DomainArguments, HubData

Row = dict[str, Any]
CSV_EXAMPLE = "Which organ makes insulin?,the liver,the pancreas,the spleen,the lung,B"


def read_file(path: str) -> list[Row]:
    """The rows of a JSON Lines file, or of a CSV file as MMLU's are (question, choices, letter of the right one).

    Raises:
        ValueError: If a line is no row.
    """
    return read_csv(path) if path.endswith(".csv") else read_json_lines(path)


def read_json_lines(path: str) -> list[Row]:
    """The rows of a JSON Lines file."""
    rows = []
    # at "\n" alone: splitlines() would cut a text at the line separators (U+2028) that JSON lets stand in it
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected a JSON object a line, got {line[:60]!r} in line {number} of {path}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Expected a JSON object a line, got {line[:60]!r} in line {number} of {path}.")
        rows.append(row)
    return rows


def read_csv(path: str) -> list[Row]:
    """The rows of a CSV file without a header: question, choices, letter of the right choice."""
    rows = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            *asked, letter = cells or [""]
            choices, place = asked[1:], "ABCDEFGHIJ".find(letter.strip().upper() or "-")
            if len(choices) < 2 or not 0 <= place < len(choices):
                raise ValueError(
                    f"Expected question, choices and the letter of the right choice, got {len(cells)} cells that end with "
                    f"{letter!r} in row {number} of {path}. A row looks like this:\n{CSV_EXAMPLE}"
                )
            rows.append({"question": asked[0], "choices": choices, "answer": place})
    return rows


def read_hub(recipe: DomainArguments, data: HubData) -> dict[str, list[Row]]:
    """The rows of a data set on the Hub by split; `recipe.dataset_revision` becomes the commit that was read."""
    parts = load_dataset(recipe.dataset_name, recipe.dataset_config_name, revision=recipe.dataset_revision)
    recipe.dataset_revision = (source_of(next(iter(parts.values()))) or {}).get("revision") or recipe.dataset_revision
    rows = {}
    for split, part in parts.items():
        if split in ("train", "validation", "test") and split not in data.unlabelled:
            label = part.features.get("label")
            names = label.names if isinstance(label, ClassLabel) and "text" in part.features else None
            shaped = (data.to_row({**row, "label": names[row["label"]]} if names else row) for row in part)
            rows[split] = [row for row in shaped if row is not None]
    return rows
