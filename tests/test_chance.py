"""Whether the loss has left chance: on cases worked out by hand, on models that know and do not; and in a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import Trainer, TrainingArguments

from trimllm_hf import TrimCallback, TrimConfig
from trimllm_hf.engines.process_group import SingleProcess
from trimllm_hf.importance import evaluate_metric
from trimllm_hf.importance.unigram_baseline import frequency_loss, loss_at_unigram_baseline


def counting(size: int = 64, length: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Texts that count: each token is the one before plus one, so that a model soon knows them."""
    starts = torch.randint(3, VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(seed))
    ids = 3 + (starts - 3 + torch.arange(length)) % (VOCABULARY - 3)
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(examples: list[dict[str, torch.Tensor]], size: int = 8) -> list[dict[str, torch.Tensor]]:
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [{name: torch.stack([example[name] for example in part]) for name in part[0]} for part in parts]


def test_the_loss_of_a_model_that_knows_only_frequencies() -> None:
    # a label among n - 1 others of which m are of its class is predicted with m / (n - 1)
    assert frequency_loss([0, 0, 1, 1], 2) == pytest.approx(math.log(2))  # -log(1/3) is worse than knowing nothing
    expected = -(0.9 * math.log(89 / 99) + 0.1 * math.log(9 / 99))
    assert frequency_loss([0] * 90 + [1] * 10, 2) == pytest.approx(expected)
    # never seen among the others: one in two labels is such a one here, spread over all ten classes
    expected = -(0.5 * math.log(0.5 * 4 / 9 + 0.05) + 0.5 * math.log(0.05))
    assert frequency_loss([0, 0, 0, 0, 0, 1, 2, 3, 4, 5], 10) == pytest.approx(min(expected, math.log(10)))
    assert frequency_loss(list(range(64)), 50_000) == pytest.approx(math.log(50_000))  # each once: they tell nothing
    assert frequency_loss([3] * 64, 50_000) == 0  # always the same: nothing is left to learn
    assert frequency_loss([7], 97) == pytest.approx(math.log(97))


def test_it_estimates_the_entropy_of_the_labels() -> None:
    """From a sample that has not seen all classes, where counting alone falls short of it by a nat."""
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, 5001, dtype=torch.float64)
    shares /= shares.sum()
    entropy = -(shares * shares.log()).sum().item()
    labels = torch.multinomial(shares, 1500, replacement=True, generator=generator).tolist()
    counts = torch.tensor([labels.count(label) for label in set(labels)], dtype=torch.float64) / 1500
    assert -(counts * counts.log()).sum() < entropy - 0.8
    assert frequency_loss(labels, 5000) == pytest.approx(entropy, abs=0.4)


@pytest.fixture(scope="module")
def taught() -> Any:
    """A language model that has learned to count."""
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        loss = model(**batches(counting(16, seed=100 + step), 16)[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_language_model(taught: Any) -> None:
    held = batches(counting())
    found = loss_at_unigram_baseline(tiny_model(), held)
    assert found is not None
    loss, bar = found
    with torch.no_grad():
        assert loss == pytest.approx(sum(tiny_model()(**batch).loss.item() for batch in held) / len(held), rel=1e-5)
    assert bar == pytest.approx(math.log(94), abs=0.2) and loss > bar
    assert loss_at_unigram_baseline(taught, held) is None
    assert evaluate_metric(taught, held) < 0.9 * bar


def test_a_classifier_with_a_fresh_head_and_with_a_taught_one() -> None:
    model: Any = tiny_model("bert", num_labels=3)
    model.classifier.weight.data.mul_(0.01)
    rows = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(counting(48))]
    held = batches(rows)
    found = loss_at_unigram_baseline(model, held)
    assert found is not None and found[0] == pytest.approx(math.log(3), abs=0.1) and found[1] == pytest.approx(math.log(3))
    told = [{**row, "input_ids": torch.cat([row["labels"][None] + 3, row["input_ids"][1:]])} for row in rows]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        for batch in batches(told):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss_at_unigram_baseline(model, batches(told)) is None
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_regression_and_what_cannot_be_told() -> None:
    model: Any = tiny_model("bert", num_labels=1)
    values = torch.linspace(-1, 1, 16)
    rows = [{"input_ids": row["input_ids"], "labels": value} for row, value in zip(counting(16), values, strict=True)]
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.zero_()
    found = loss_at_unigram_baseline(model, batches(rows))
    assert found == pytest.approx((values.var(correction=0).item(), values.var(correction=0).item()), rel=1e-5)
    several: Any = tiny_model("bert", num_labels=2, problem_type="multi_label_classification")
    rows = [{**row, "labels": torch.tensor([1.0, 0.0])} for row in rows]
    assert loss_at_unigram_baseline(several, batches(rows)) is None
    assert loss_at_unigram_baseline(tiny_model(), [{"input_ids": row["input_ids"][None]} for row in rows]) is None
    masked = [{"input_ids": row["input_ids"][None], "labels": torch.full((1, 12), -100)} for row in rows]
    assert loss_at_unigram_baseline(tiny_model(), masked) is None


def test_all_processes_say_the_same() -> None:
    """Two shares, of two batches and of one, give what one process says of all three: each counts the others' labels."""
    held = batches(counting(24))
    whole = loss_at_unigram_baseline(tiny_model(), held)
    calls: list[list[Any]] = []

    class Beside(SingleProcess):
        """What the process with the last batch says, when it is asked in turn."""

        def __init__(self, answers: list[Any] | None) -> None:
            self.answers, self.number = answers, 0

        def gather(self, value: Any) -> list[Any]:
            self.number += 1
            if self.answers is None:
                calls.append(value)
                return [value]
            return [value, self.answers[self.number - 1]]

    loss_at_unigram_baseline(tiny_model(), held[2:], process_group=Beside(None))
    assert loss_at_unigram_baseline(tiny_model(), held[:2], process_group=Beside(calls)) == pytest.approx(whole)


def test_a_run_scans_only_when_its_loss_has_left_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("trimllm_hf.training.selection.logger.warning", said.append)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=71,
        per_device_train_batch_size=16,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    chosen = {}
    for instead in ("block_influence", "none", "last"):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        learns = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 35))  # only after the first drop
        trim = TrimConfig(
            target_layers=4, drop_every="35", importance="sensitivity", repair="none", warm_up_importance=instead
        )
        callback = TrimCallback(trim, calibration_dataset=counting(16, seed=7))
        Trainer(model, args, train_dataset=counting(1200), callbacks=[callback], optimizers=(optimizer, learns)).train()
        chosen[instead] = [record["importance"] for record in model.config.trim["history"]]
    assert chosen == {
        "block_influence": ["block_influence", "sensitivity"],
        "none": ["sensitivity", "sensitivity"],
        "last": ["last", "sensitivity"],
    }
    told = [line for line in said if "is at chance" in line]
    assert len(told) == 2 and all(line.startswith("Step 35: the loss on the calibration set") for line in told)
    assert told[0].endswith("Choosing by block_influence instead of sensitivity.")
    assert told[1].endswith("Choosing by last instead of sensitivity.")
