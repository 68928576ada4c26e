"""Which layers a training run drops: by one ranking or greedily, by ties, by windows, by the step's own gradients."""

from __future__ import annotations

import copy
import logging as python_logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer, drop_layers, score_layers

CALIBRATION = tiny_texts(8, seed=5)
BATCHES = [{name: torch.stack([row[name] for row in CALIBRATION[i : i + 4]]) for name in CALIBRATION[0]} for i in (0, 4)]

ONCE = {"drop_every": "once", "warm_up_importance": "none", "repair": "none"}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    fixed = {"save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **fixed, **changes})


def run(folder: Path, model: Any = None, callbacks: Any = (), of_trainer: Any = None, **trim: Any) -> Trainer:
    config = TrimConfig(**{"target_layers": 3, "importance": "sensitivity", **ONCE, **trim})
    callback = TrimCallback(config, calibration_dataset=CALIBRATION)
    trainer = Trainer(
        model or tiny_model(),
        arguments(folder),
        train_dataset=tiny_texts(),
        callbacks=[callback, *callbacks],
        **(of_trainer or {}),
    )
    trainer.train()
    return trainer


def history(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.model.config.trim["history"]


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "trim/score" in entry]


def test_greedily_each_drop_is_the_best_of_what_is_left(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    model, kept = tiny_model(), list(range(6))
    assert len(history(trainer)) == 3
    (entry,) = logged(trainer)  # the record of the first step tells of the last drop
    for record in history(trainer):
        scores = score_layers(model, BATCHES)
        inner = scores[1:-1].sort().values
        lowest = 1 + int(scores[1:-1].argmin())
        assert record["dropped"] == [kept.pop(lowest)] and record["scores"] == [pytest.approx(inner[0].item())]
        margin = (inner[1] - inner[0]).item()
        drop_layers(model, [lowest])
    assert entry["trim/margin"] == pytest.approx(margin) and entry["trim/num_layers"] == 3


def test_by_one_ranking_the_lowest_go_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.get_logger("transformers.trimllm_hf")
    logger.addHandler(caplog.handler)
    logger.setLevel(python_logging.INFO)
    try:
        trainer = run(tmp_path, rescore=False)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(python_logging.NOTSET)
    scores = score_layers(tiny_model(), BATCHES)
    order = (1 + scores[1:-1].argsort()).tolist()
    (record,), (entry,) = history(trainer), logged(trainer)
    assert record["dropped"] == sorted(order[:3])
    margin = (scores[order[3]] - scores[order[2]]).item()
    assert entry["trim/margin"] == pytest.approx(margin) and entry["trim/num_layers"] == 3
    line = next(message for message in caplog.messages if message.startswith("Step 0: dropped layers"))
    assert f"margin to the next best {margin:.4g}" in line and f"sensitivity {scores[order[2]]:.4f}" in line


def test_two_at_a_time_by_one_ranking(tmp_path: Path) -> None:
    trainer = run(tmp_path, drop_every="2", layers_per_drop=2, rescore=False, target_layers=3)
    assert [(record["step"], len(record["dropped"])) for record in history(trainer)] == [(2, 2), (4, 1)]


def test_angular_drops_successive_layers(tmp_path: Path) -> None:
    trainer = run(tmp_path, importance="angular")
    scores = score_layers(tiny_model(), BATCHES, "angular", window=3)
    start = 1 + int(scores[1:3].argmin())
    (record,) = history(trainer)
    assert record["dropped"] == [start, start + 1, start + 2] and record["scores"] == [pytest.approx(scores[start])] * 3
    assert logged(trainer)[0]["trim/margin"] == pytest.approx((scores[1:3].max() - scores[1:3].min()).item())


def constant(prediction: Any) -> dict[str, float]:
    """All layers are alike to it, as they can be to an accuracy on few examples."""
    return {"alike": 0.5}


def kept_least(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return predictions.argmax(-1)


def test_ties_go_by_the_tie_breaker(tmp_path: Path) -> None:
    metrics = {"compute_metrics": constant, "preprocess_logits_for_metrics": kept_least}
    trainer = run(tmp_path, of_trainer=metrics, scan_metric="alike", tie_breaker="activation_norm", target_layers=5)
    scores = score_layers(tiny_model(), BATCHES, "activation_norm")
    (record,), (entry,) = history(trainer), logged(trainer)
    assert record["dropped"] == [1 + int(scores[1:-1].argmin())] and record["scores"] == [-0.5]
    assert entry["trim/margin"] == 0
    unbroken = run(tmp_path, of_trainer=metrics, scan_metric="alike", target_layers=5)
    assert history(unbroken)[0]["dropped"] == [4]  # the deepest that is not protected


def test_compute_metrics_without_the_key_lists_its_keys(tmp_path: Path) -> None:
    metrics = {"compute_metrics": constant, "preprocess_logits_for_metrics": kept_least}
    model = tiny_model()
    with pytest.raises(ValueError, match=r"compute_metrics to return 'accuracy', got \['alike'\]"):
        run(tmp_path, model, of_trainer=metrics, scan_metric="accuracy")
    assert len(model.model.layers) == 6


def test_a_metric_without_compute_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric among \['choice_accuracy', 'loss'\], got 'accuracy'"):
        run(tmp_path, scan_metric="accuracy")


def test_an_unknown_tie_breaker_is_refused_before_training(tmp_path: Path) -> None:
    trim = TrimConfig(target_layers=3, tie_breaker="activation-norm")
    with pytest.raises(ValueError, match=r"importance among .*got 'activation-norm'"):
        Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(trim)])


def test_the_accuracy_on_choices(tmp_path: Path) -> None:
    """TrimLLM's best: the accuracy on choices, ties broken by the activation norm; columns pass the collator."""
    rows = []
    for number, text in enumerate(CALIBRATION):
        for right in (0, 1):
            ids = text["input_ids"].clone()
            if not right:
                ids[-4:] = (ids[-4:].flip(0) + 1) % 97
            labels = ids.clone()
            labels[:-4] = -100
            rows.append({"input_ids": ids, "labels": labels, "question": number, "right": right})
    choices = {"scan_metric": "choice_accuracy", "tie_breaker": "activation_norm", "warm_up_importance": "none"}
    trim = TrimConfig(target_layers=5, drop_every="once", repair="none", **choices)
    trainer = TrimTrainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), trim=trim, calibration_dataset=rows)
    trainer.train()
    accuracies = []
    for position in range(1, 5):
        model = tiny_model()
        drop_layers(model, [position])
        hits = 0
        for i in range(0, len(rows), 2):
            found = []
            for row in rows[i : i + 2]:
                with torch.no_grad():
                    logits = model(row["input_ids"][None]).logits[0, -5:-1].log_softmax(-1)
                found.append(logits[torch.arange(4), row["input_ids"][-4:]].sum().item())
            hits += found[1] > found[0]
        accuracies.append(hits / 8)
    (record,) = history(trainer)
    assert record["scores"] == [-max(accuracies)]
    norms = score_layers(tiny_model(), [{"input_ids": torch.stack([row["input_ids"] for row in rows])}], "activation_norm")
    best = [position for position in range(1, 5) if accuracies[position - 1] == max(accuracies)]
    assert record["dropped"] == [min(best, key=lambda position: norms[position].item())]


# ---- taylor, from the gradients of the step


class Gradients(TrainerCallback):
    """What the gradients of each step say, seen from outside."""

    def __init__(self, when_training: Any = lambda: None) -> None:
        self.seen: dict[int, list[float]] = {}
        self.when_training = when_training  # called when the first step begins

    def on_step_begin(self, args, state, control, **kwargs):
        self.when_training()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step + 1] = [
            sum((p.detach() * p.grad).abs().sum().item() for p in block.parameters()) for block in model.model.layers
        ]


def test_taylor_takes_the_gradients_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no pass beside training")

    gradients = Gradients(lambda: monkeypatch.setattr("trimllm_hf.training.layer_scorer.score_layers", refuse))
    trainer = run(tmp_path, callbacks=[gradients], importance="taylor", drop_every="2", target_layers=4)
    assert [record["step"] for record in history(trainer)] == [2, 4]
    kept = list(range(6))
    for record in history(trainer):
        seen = torch.tensor(gradients.seen[record["step"]])
        position = 1 + int(seen[1:-1].argmin())
        assert record["dropped"] == [kept.pop(position)] and record["scores"] == [pytest.approx(seen[position].item())]


def test_taylor_two_at_a_time_by_the_same_gradients(tmp_path: Path) -> None:
    gradients = Gradients()
    trainer = run(tmp_path, callbacks=[gradients], importance="taylor", drop_every="2", layers_per_drop=2, target_layers=4)
    seen = torch.tensor(gradients.seen[2])
    dropped = sorted(layer for record in history(trainer) for layer in record["dropped"])
    assert dropped == sorted((1 + seen[1:-1].argsort()[:2]).tolist())


def test_taylor_before_the_first_step_is_on_the_calibration_set(tmp_path: Path) -> None:
    model = tiny_model()
    scores = score_layers(model, BATCHES, "taylor")
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer = run(tmp_path, importance="taylor", target_layers=5)
    (record,) = history(trainer)
    assert record["dropped"] == [1 + int(scores[1:-1].argmin())]
    assert record["scores"] == [pytest.approx(scores[1:-1].min().item(), rel=1e-5)]


def test_a_step_without_a_layer_is_not_scored_by(tmp_path: Path) -> None:
    class Skip(TrainerCallback):
        """Leaves a layer out of the second step, as LayerDrop does."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.layers[2].forward = lambda hidden_states, *args, **kwargs: hidden_states

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                self.absent = all(p.grad is None for p in model.model.layers[2].parameters())
                del model.model.layers[2].forward

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.model = copy.deepcopy(model)

    skip = Skip()
    trim = TrimConfig(5, importance="taylor", drop_every="2", repair="none", warm_up_importance="none")
    callbacks = [skip, TrimCallback(trim, calibration_dataset=CALIBRATION)]
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=callbacks)
    trainer.train()
    scores = score_layers(skip.model, BATCHES, "taylor")
    (record,) = history(trainer)
    assert skip.absent and record["step"] == 2
    assert record["dropped"] == [1 + int(scores[1:-1].argmin())]
    assert record["scores"] == [pytest.approx(scores[1:-1].min().item(), rel=1e-5)]


def test_an_overflowed_step_is_not_scored_by(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 2:
                model.model.layers[2].mlp.up_proj.weight.grad.fill_(float("inf"))

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                self.kept = {name: value.clone() for name, value in model.state_dict().items()}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.load_state_dict(self.kept)  # as a gradient scaler skips the step

    by_gradients = {"importance": "taylor", "warm_up_importance": "none"}
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path, max_grad_norm=0),
        train_dataset=tiny_texts(),
        callbacks=[
            Overflow(),
            TrimCallback(TrimConfig(5, drop_every="2", repair="none", **by_gradients), calibration_dataset=CALIBRATION),
        ],
    )
    trainer.train()
    (record,) = history(trainer)
    assert 0 < record["scores"][0] < float("inf")
