"""Training, validation and test questions that have nothing in common, from files or from the Hub."""

import hashlib
import random
from collections.abc import Sequence

from transformers.utils import logging

from trimllm_hf.choice_accuracy import Question

from .questions import Asking, Fits, asked_in, make_questions, shape_of
from .rows import Row, read_file, read_hub
from .settings import Domain, DomainArguments, HubData

logger = logging.get_logger("transformers.trimllm_hf")

HELD_OUT, MOST_HELD_OUT = 5, 1000  # one row of five, but no more than a thousand
Splits = dict[str, list[Row]]


def load_splits(recipe: DomainArguments, domain: Domain, encoder: Fits, seed: int) -> dict[str, list[Question]]:
    """Questions of the splits `train` (where there is one), `validation` and `test`.

    Without validation data some training rows are held out; without test data the validation data are the test data.

    Raises:
        ValueError: If a split is empty, a row lacks a field, the test data have a label that is not trained, a row stands
            in two splits, or no question of a split fits into the context.
    """
    rows, sources = read_splits(recipe, domain)
    shapes = {split: shape_of(part, sources[split]) for split, part in rows.items()}
    part_apart(rows, sources, shapes, recipe.drop_overlap)
    if "validation" not in rows and "train" in rows:
        rows["train"], rows["validation"] = hold_out(rows["train"], shapes["train"], seed)
        sources["validation"], shapes["validation"] = f"what was held out of {sources['train']}", shapes["train"]
    asking = Asking(domain.asks, common_labels(rows, sources, shapes), recipe.max_choices)
    questions = {}
    for split, part in rows.items():
        made = make_questions(part, sources[split], encoder, seed, asking)
        limit = recipe.max_train_samples if split == "train" else recipe.max_eval_samples
        questions[split] = random.Random(seed).sample(made, min(len(made), limit or len(made)))
    questions.setdefault("test", questions.get("validation", []))
    questions.setdefault("validation", questions["test"])
    return questions


def load_off_domain(recipe: DomainArguments, domain: Domain, encoder: Fits, seed: int) -> list[Question]:
    """The questions of the files outside the domain together; none where no file is given."""
    rows = [(path, read_file(path)) for path in recipe.off_domain_file or ()]
    made: list[Question] = []
    for path, part in rows:
        shape = shape_of(part, path)
        labels = tuple(sorted({row["label"] for row in part})) if shape == "label" else ()
        made += make_questions(part, path, encoder, seed, Asking(domain.asks, labels, recipe.max_choices))
    return random.Random(seed).sample(made, min(len(made), recipe.max_eval_samples))


def read_splits(recipe: DomainArguments, domain: Domain) -> tuple[Splits, dict[str, str]]:
    """The rows of each split, and where they come from in words."""
    files = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
    if any(files.values()):
        named = {split: path for split, path in files.items() if path}
        return {split: read_file(path) for split, path in named.items()}, named
    known = domain.hub.get(str(recipe.dataset_name), HubData("unknown"))
    rows = read_hub(recipe, known)
    return rows, {split: f"the {split} split of {recipe.dataset_name}" for split in rows}


def hold_out(rows: Sequence[Row], shape: str, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those that are held out; rows that ask the same stand on one side together."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        alike.setdefault(digest(asked_in(row, shape)), []).append(row)
    groups = random.Random(seed).sample(list(alike.values()), len(alike))
    size = min(max(1, len(groups) // HELD_OUT), MOST_HELD_OUT)
    held_out, kept = groups[:size], groups[size:]
    return [row for group in kept for row in group], [row for group in held_out for row in group]


def digest(text: str) -> str:
    """The hash of a text; letter case and white space make no difference."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def part_apart(rows: Splits, sources: dict[str, str], shapes: dict[str, str], drop: bool) -> None:
    """See to it that no row of a split stands in one that is more to be trusted: test, then validation, then train.

    Raises:
        ValueError: If one does, and `drop` does not leave it out.
    """
    trusted: list[str] = []
    for split in ("test", "validation", "train"):
        if split not in rows:
            continue
        hashes = [digest(asked_in(row, shapes[split])) for row in rows[split]]
        for other in trusted:
            known = {digest(asked_in(row, shapes[other])) for row in rows[other]}
            found = [place for place, held in enumerate(hashes) if held in known]
            if found and not drop:
                example = " ".join(asked_in(rows[split][found[0]], shapes[split]).split())
                raise ValueError(
                    f"Expected rows in {sources[split]} that are not in {sources[other]}, got {len(found)} of "
                    f"{len(rows[split])} that are, by the hash of their text, e.g. {example[:80]!r}. A score on them would "
                    f"tell nothing. Take them out, or give --drop_overlap: it leaves them out of the {split} data."
                )
            if found:
                logger.warning(f"Left {len(found)} rows out of {sources[split]}: they are in {sources[other]} as well.")
                gone = set(found)
                rows[split] = [row for place, row in enumerate(rows[split]) if place not in gone]
                hashes = [held for place, held in enumerate(hashes) if place not in gone]
                if not rows[split]:
                    raise ValueError(f"Expected rows in {sources[split]} of its own, got none: all are in {sources[other]}.")
        trusted.append(split)


def common_labels(rows: Splits, sources: dict[str, str], shapes: dict[str, str]) -> tuple[str, ...]:
    """The labels of labelled texts: those of the training data, or of the test data where nothing is trained.

    Raises:
        ValueError: If another split has a label that these have not, or there is one label only.
    """
    found = {split: {row["label"] for row in part} for split, part in rows.items() if shapes[split] == "label"}
    if not found:
        return ()
    first = next(split for split in ("train", "test", "validation") if split in found)
    for split, labels in found.items():
        if new := sorted(labels - found[first]):
            raise ValueError(
                f"Expected the same labels in every split, got {new} in {sources[split]}, which {sources[first]} has not "
                f"({len(found[first])} labels, such as {sorted(found[first])[:3]}). Is it spelled in another way?"
            )
        if gone := sorted(found[first] - labels):
            logger.warning(f"{sources[split]} has no text labelled {', '.join(gone)}; they can be answered all the same.")
    if len(found[first]) < 2:
        raise ValueError(f"Expected two labels or more in {sources[first]}, got {sorted(found[first])} only.")
    return tuple(sorted(found[first]))
