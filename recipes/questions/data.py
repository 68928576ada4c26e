"""Rows, of files or of the Hub, as multiple-choice questions in splits that have nothing in common."""

import csv
import hashlib
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, load_dataset
from questions.choice_accuracy import Question
from transformers.utils import logging

logger = logging.get_logger("transformers.trimllm_hf")

Row = dict[str, Any]
DECISIONS = ("yes", "no", "maybe")
SHAPES: dict[str, Row] = {  # a row has the first that fits
    "choices": {"question": "Which organ does insulin act on?", "choices": ["the liver", "the lens"], "answer": 0},
    "decision": {"question": "Does aspirin prevent stroke?", "context": "We followed 200 …", "label": "maybe"},
    "answer": {"question": "What causes gout?", "answer": "Uric acid …", "qtype": "causes", "focus": "Gout"},
    "label": {"text": "Shares of the bank fell by a tenth.", "label": "bearish"},
}
HELD_OUT, MOST_HELD_OUT = 5, 1000  # one row of five, but no more than a thousand


@dataclass
class DataArguments:
    """What every recipe takes besides `TrainingArguments`."""

    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M"
    dataset_name: str = ""  # by default the first that the recipe's docstring names
    dataset_config_name: str | None = None
    dataset_revision: str | None = None  # a branch, tag or commit; the commit that was read stands on the card
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    off_domain_file: list[str] | None = field(default=None, metadata={"help": "Of other domains: .jsonl, or MMLU's .csv."})
    general_file: str | None = None  # a text outside the domain
    max_length: int = 1024  # tokens of context, question and answer; the model's own context is a limit as well
    max_choices: int | None = field(default=None, metadata={"help": "Labels a question; the wrong ones are drawn."})
    max_train_samples: int | None = None
    max_eval_samples: int = 500
    drop_overlap: bool = field(default=False, metadata={"help": "Leave out training rows that are in the test data."})
    demo: bool = False


class HubData(NamedTuple):
    """A data set on the Hub: its licence, its configuration, a row as one of `SHAPES`, splits without public answers."""

    licence: str
    config: str | None = None
    to_row: Callable[[Row], Row] = lambda row: row
    unlabelled: Sequence[str] = ()


@dataclass
class Split:
    """Rows of one shape, and where they come from in words; refused, with an example, where a field is senseless."""

    rows: list[Row]
    source: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"Expected questions in {self.source}, got none: it is empty.")
        self.shape = shape = next((name for name, row in SHAPES.items() if row.keys() <= self.rows[0].keys()), "")
        wanted = [SHAPES[shape]] if shape else list(SHAPES.values())
        for number, row in enumerate(self.rows, start=1):
            where = f"in row {number} of {self.source}"
            if not shape or not wanted[0].keys() <= row.keys():
                fields = " or ".join(str(list(example)) for example in wanted)
                lines = "\n".join(json.dumps(example, ensure_ascii=False) for example in wanted)
                raise ValueError(f"Expected the fields {fields}, got {list(row)} {where}. A row looks like this:\n{lines}")
            if shape == "decision" and row["label"] not in DECISIONS:
                raise ValueError(f"Expected a label of {DECISIONS}, got {row['label']!r} {where}.")
            if shape == "choices" and row["answer"] not in range(len(row["choices"])):
                raise ValueError(f"Expected as answer the index of one of {row['choices']}, got {row['answer']!r} {where}.")
            if shape == "label" and not (isinstance(row["label"], str) and row["label"].strip()):
                raise ValueError(f"Expected as label a word or words, got {row['label']!r} {where}.")

    def asked(self, row: Row) -> str:
        """What makes a row the same question as another one: its texts; of choices, the right one as well."""
        right = row["choices"][row["answer"]] if self.shape == "choices" else row.get("answer")
        return "\n".join(text for text in (row.get("text"), row.get("context"), row.get("question"), right) if text)

    def digests(self) -> list[str]:
        """A hash of what each row asks, without regard to letter case and white space."""
        asked = (" ".join(self.asked(row).casefold().split()) for row in self.rows)
        return [hashlib.sha256(text.encode()).hexdigest() for text in asked]


def load_questions(
    recipe: DataArguments, hub: Mapping[str, HubData], asks: str, encoder: Any, seed: int
) -> dict[str, list[Question]]:
    """Questions of `train`, `validation`, `test` and, if given, `off_domain`; `asks` is asked of a labelled text.

    Without validation data some training rows are held out; without test data the validation data are the test data.
    """
    files = {"train": recipe.train_file, "test": recipe.test_file, "validation": recipe.validation_file}
    if any(files.values()):
        splits = {split: Split(list(read_file(path)), path) for split, path in files.items() if path}
    else:
        rows = read_hub(recipe, hub.get(recipe.dataset_name, HubData("unknown")))
        splits = {split: Split(part, f"the {split} split of {recipe.dataset_name}") for split, part in rows.items()}
    part_apart(splits, recipe.drop_overlap)
    if "validation" not in splits and "train" in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], seed)
    how, labels = (encoder, seed, asks), common_labels(splits.values())
    questions = {name: make_questions(split, *how, labels, recipe.max_choices) for name, split in splits.items()}
    questions.setdefault("test", questions.get("validation", []))
    questions.setdefault("validation", questions["test"])
    for path in recipe.off_domain_file or ():
        split = Split(list(read_file(path)), path)
        made = make_questions(split, *how, common_labels([split]), recipe.max_choices)
        questions["off_domain"] = questions.get("off_domain", []) + made
    for name, made in questions.items():
        limit = recipe.max_train_samples if name == "train" else recipe.max_eval_samples
        questions[name] = random.Random(seed).sample(made, min(len(made), limit or len(made)))
    return questions


def read_file(path: str) -> Iterator[Row]:
    """The rows of a JSON Lines file, or of a CSV file as MMLU's are: question, choices, letter of the right one."""
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".csv"):
        for number, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
            *asked, letter = cells or [""]
            choices, place = asked[1:], "ABCDEFGHIJ".find(letter.strip().upper() or "-")
            if len(choices) < 2 or not 0 <= place < len(choices):
                raise ValueError(
                    f"Expected question, choices and the letter of the right choice, got {len(cells)} cells that end with "
                    f"{letter!r} in row {number} of {path}. Such as:\nWhich organ makes insulin?,the liver,the pancreas,B"
                )
            yield {"question": asked[0], "choices": choices, "answer": place}
        return
    # at "\n" alone: splitlines() would cut a text at the line separators (U+2028) that JSON lets stand in it
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield {**json.loads(line)}
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"Expected a JSON object a line, got {line[:60]!r} in line {number} of {path}.") from error


def read_hub(recipe: DataArguments, data: HubData) -> dict[str, list[Row]]:
    """The rows of a data set on the Hub by split; `recipe.dataset_revision` becomes the commit that was read."""
    recipe.dataset_config_name = recipe.dataset_config_name or data.config
    parts = load_dataset(recipe.dataset_name, recipe.dataset_config_name, revision=recipe.dataset_revision)
    urls = " ".join(url for part in parts.values() for url in part.info.download_checksums or ())
    recipe.dataset_revision = next(iter(re.findall("@([0-9a-f]{40})/", urls)), recipe.dataset_revision)
    rows = {}
    for split in [name for name in ("train", "test", "validation") if name in parts and name not in data.unlabelled]:
        label = parts[split].features.get("label")
        names = label.names if isinstance(label, ClassLabel) and "text" in parts[split].features else None
        rows[split] = [data.to_row({**row, "label": names[row["label"]]} if names else row) for row in parts[split]]
    if not rows:
        raise ValueError(f"Expected a split train, validation or test in {recipe.dataset_name}, got {list(parts)}.")
    return rows


def hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    """The rows to train on and those that are held out; rows that ask the same stand on one side together."""
    alike: dict[str, list[Row]] = defaultdict(list)
    for row, digest in zip(split.rows, split.digests(), strict=True):
        alike[digest].append(row)
    groups = random.Random(seed).sample(list(alike.values()), len(alike))
    size = min(max(1, len(groups) // HELD_OUT), MOST_HELD_OUT)
    kept, held_out = ([row for group in part for row in group] for part in (groups[size:], groups[:size]))
    return Split(kept, split.source), Split(held_out, f"what was held out of {split.source}")


def part_apart(splits: dict[str, Split], drop: bool) -> None:
    """See to it that no row of a split stands in one that is more to be trusted: test, then validation, then train."""
    known: dict[str, str] = {}  # the rows' hashes, each with where its row stands
    for name in [name for name in ("test", "validation", "train") if name in splits]:
        split, digests = splits[name], splits[name].digests()
        twice = [(row, known[digest]) for row, digest in zip(split.rows, digests, strict=True) if digest in known]
        others, count = " and ".join(sorted({other for _, other in twice})), f"{len(twice)} of {len(digests)}"
        if twice and not drop:
            example = " ".join(split.asked(twice[0][0]).split())[:80]
            raise ValueError(
                f"Expected rows in {split.source} that are not in {others}, got {count} that are, by the hash of their "
                f"text, e.g. {example!r}. A score on them would tell nothing. Take them out, or give --drop_overlap, "
                "which does."
            )
        if twice:
            logger.warning(f"Left {count} rows out of {split.source}: they are in {others} as well.")
            own = [row for row, digest in zip(split.rows, digests, strict=True) if digest not in known]
            splits[name] = Split(own, f"{split.source} without the rows of {others}")
        known |= dict.fromkeys(digests, split.source)


def common_labels(splits: Iterable[Split]) -> tuple[str, ...]:
    """The labels of labelled texts: those of the first split, which is the training data where there are any."""
    labelled = {split.source: {row["label"] for row in split.rows} for split in splits if split.shape == "label"}
    source, known = next(iter(labelled.items()), ("", set()))
    for other, labels in labelled.items():
        if new := sorted(labels - known):
            raise ValueError(
                f"Expected the same labels in every split, got {new} in {other}, which {source} has not "
                f"({len(known)} labels, such as {sorted(known)[:3]}). Is it spelled in another way?"
            )
    if labelled and len(known) < 2:
        raise ValueError(f"Expected two labels or more in {source}, got {sorted(known)} only.")
    return tuple(sorted(known))


def make_questions(
    split: Split, encoder: Any, seed: int, asks: str = "", labels: tuple[str, ...] = (), most: int | None = None
) -> list[Question]:
    """Questions from rows of any shape, drawn with `seed`. Those that do not fit are left out, and counted."""
    rng = random.Random(seed)
    if split.shape == "answer":
        return choose_among_answers(split, encoder, rng)
    made = []
    for row in split.rows:
        if split.shape == "choices":
            choices, context = tuple(row["choices"]), row.get("context") or ""
            made.append(Question(row["question"], choices, row["answer"], context, bool(row.get("per_token"))))
        elif split.shape == "decision":
            made.append(Question(row["question"], DECISIONS, DECISIONS.index(row["label"]), row["context"]))
        else:
            choices, right = labels, row["label"]
            if most is not None and most < len(labels):
                others = rng.sample([label for label in labels if label != right], most - 1)
                choices = tuple(rng.sample([right, *others], most))
            made.append(Question(asks, choices, choices.index(right), row["text"]))
    return list(encoder.fitting(made, split.source))


def choose_among_answers(split: Split, encoder: Any, rng: random.Random) -> list[Question]:
    """Each answer among three others to the same type of question."""
    # what is too long goes before choices are drawn: otherwise most questions would go for the sake of a long rival
    alone = {Question(row["question"], (row["answer"],), 0): row for row in split.rows}
    rows = [alone[question] for question in encoder.fitting(list(alone), split.source)]
    by_type: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        by_type[row["qtype"]].append(row)
    made = []
    for row in rows:
        drawn = rng.sample(by_type[row["qtype"]], min(16, len(by_type[row["qtype"]])))
        # of another focus: what a second source says to the same question could be right as well
        rivals = dict.fromkeys(r["answer"] for r in drawn if r["focus"] != row["focus"] and r["answer"] != row["answer"])
        if len(rivals) >= 3:
            choices = rng.sample([row["answer"], *list(rivals)[:3]], 4)
            made.append(Question(row["question"], tuple(choices), choices.index(row["answer"]), per_token=True))
    if not made:
        raise ValueError(f"Expected four answers to one type of question in {split.source}, got no type with so many.")
    if others := len(rows) - len(made):
        logger.warning(f"{split.source}: left out {others} questions, which have no three rivals of their type.")
    return list(encoder.fitting(made, split.source))
