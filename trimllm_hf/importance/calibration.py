"""The calibration set: training examples used to score layers, set aside from training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset

Batch = dict[str, Any]
CHOICE_COLUMNS = ("question", "right", "per_token")  # of rows that hold a question with one of its choices


def set_aside(dataset: Any, size: int, seed: int) -> tuple[list[Any], Any]:
    """Split a training set into calibration examples and the rest.

    From a map-style data set, `size` examples are drawn with `seed`. From a streaming one, the first `size` are taken, and
    skipped whenever they occur again.

    Args:
        dataset: A `datasets.Dataset`, a `datasets.IterableDataset`, or a torch data set of either kind.
        size: Number of examples to set aside.
        seed: Seed of the draw; torch's global generator is not touched.

    Returns:
        The examples, and a data set of the same kind without them.

    Raises:
        ValueError: If there is no data set, or it has fewer than `size` + 1 examples.
    """
    if dataset is None:
        raise ValueError("Expected a training set to draw the calibration examples from, got None.")
    if not hasattr(dataset, "__len__"):
        examples = list(islice(iter(dataset), size))
        _enough(len(examples), size, size)
        # identified by content: a shuffled stream has them at other places in the next epoch. The own filter of `datasets`
        # keeps columns, state and sharding.
        others = _NotAmong(examples)
        return examples, dataset.filter(others) if hasattr(dataset, "filter") else _Without(dataset, others)
    total = len(dataset)
    _enough(total, size, size + 1)
    chosen = draw(total, size, seed)
    rest = sorted(set(range(total)) - set(chosen))
    examples = [dataset[i] for i in chosen]
    return examples, dataset.select(rest) if hasattr(dataset, "select") else Subset(dataset, rest)


def draw(total: int, size: int, seed: int) -> list[int]:
    """Draw `size` of the numbers below `total`, with a separate generator."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:size].tolist()


def calibration_batches(
    examples: Sequence[Any],
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    columns: Sequence[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """This process's share of the examples, collated.

    Args:
        examples: All calibration examples, in the same order on each process.
        collate: The training run's collator.
        batch_size: Examples per batch.
        columns: Keep only these fields of an example, as the training data loader does.
        rank: This process's number.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no examples, or they have none of the columns.
    """
    if not examples:
        raise ValueError("Expected at least one calibration example, got none. Give a calibration set with examples.")
    share = list(examples[rank::world_size])
    if columns is not None:
        kept = (*columns, *CHOICE_COLUMNS)
        if not set(kept) & set(examples[0]):
            raise ValueError(
                f"Expected calibration examples processed like the training set, with its columns {list(columns)}, got "
                f"{list(examples[0])}. Tokenize them as the training set is, or leave calibration_dataset out."
            )
        share = [{name: example[name] for name in kept if name in example} for example in share]
    return [_collated(share[start : start + batch_size], collate) for start in range(0, len(share), batch_size)]


def _collated(rows: list[Any], collate: Callable[[list[Any]], Batch]) -> Batch:
    """A batch of rows; columns that only a scan by choices uses bypass the collator, which may not know them."""
    names = [name for name in CHOICE_COLUMNS if isinstance(rows[0], dict) and name in rows[0]]
    apart = {name: torch.tensor([int(row[name]) for row in rows]) for name in names}
    if not apart:
        return collate(rows)
    return {**collate([{name: value for name, value in row.items() if name not in names} for row in rows]), **apart}


def model_inputs(batch: Batch) -> Batch:
    """The entries of a batch that are passed to the model."""
    return {name: value for name, value in batch.items() if name not in CHOICE_COLUMNS}


def num_rows(batch: Batch) -> int:
    """Number of rows in a batch of model inputs."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() > 0)


class _NotAmong:
    """Whether an example is not among some others, compared by content."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.digests = {_digest(example) for example in examples}

    def __call__(self, example: Any) -> bool:
        return _digest(example) not in self.digests


class _Without(IterableDataset[Any]):
    """A streaming torch data set without some examples."""

    def __init__(self, dataset: Dataset[Any], others: _NotAmong) -> None:
        self.dataset, self.others = dataset, others

    def __iter__(self) -> Iterator[Any]:
        return filter(self.others, iter(self.dataset))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _digest(example: Any) -> str:
    """A hash of an example's content: arrays by their values, anything else by its printed form."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                take(str(name))
                take(value[name])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}".encode())
            for each in value:
                take(each)
        elif hasattr(value, "tolist"):
            take(value.tolist())
        else:
            found.update(f"{value!r};".encode())

    take(example)
    return found.hexdigest()


def _enough(total: int, size: int, needed: int) -> None:
    if total < needed:
        raise ValueError(
            f"Expected at least {needed} training examples, to set {size} of them aside for calibration, got {total}. "
            "Lower calibration_size, give a calibration_dataset, or train on more data."
        )
