"""Stop rules: a run stops for each reason, at the right depth, and ends with the right weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, TrimTrainer
from trimllm_hf.training.stop_rules import MetricRule, watched_metric

STEPS = 12
BY_DEPTH = {6: 0.80, 5: 0.79, 4: 0.50, 3: 0.79}  # passes at 5 layers, fails at 4, and would pass at 3


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",  # so that a run of fewer steps is a beginning of a longer one
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def config(**changes: Any) -> TrimConfig:
    settings = {"target_layers": 3, "drop_every": "2", "importance": "last", "repair": "none"}
    return TrimConfig(**{**settings, "max_metric_drop": 0.05, "stop_metric": "score", **changes})


def make(
    folder: Path,
    score: Callable[[int, int], float] = lambda depth, step: BY_DEPTH[depth],
    trim: TrimConfig | None = None,
    plain: bool = False,
    **changes: Any,
) -> Trainer:
    """A Trainer whose evaluation says `score(depth, step)`; stock, or TrimTrainer."""
    model = tiny_model()
    holder: list[Trainer] = []

    def compute_metrics(_: Any) -> dict[str, float]:
        return {"score": score(model.config.num_hidden_layers, holder[0].state.global_step)}

    common = {"train_dataset": tiny_texts(), "eval_dataset": tiny_texts(8, seed=9), "compute_metrics": compute_metrics}
    args = arguments(folder, **changes)
    trim = trim or config()
    if plain:
        trainer = Trainer(model, args, callbacks=[TrimCallback(trim)], **common)
    else:
        trainer = TrimTrainer(model, args, trim=trim, **common)
    holder.append(trainer)
    return trainer


def depths(trainer: Trainer) -> list[tuple[int, int]]:
    """The records that say a depth: of the step after a drop, since a drop follows an evaluation."""
    return [(entry["step"], entry["trim/num_layers"]) for entry in trainer.state.log_history if "trim/num_layers" in entry]


def equal(model: Any, other: Any) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("plain", [True, False], ids=["Trainer", "TrimTrainer"])
def test_a_metric_that_falls_too_far_ends_with_the_last_model_that_passed(plain: bool, tmp_path: Path) -> None:
    """The truth is a run that was told to drop one layer, after step 2, and to end after step 4."""
    scan: dict[str, Any] = {"importance": "sensitivity", "calibration_size": 8}
    trainer = make(tmp_path / "stopped", plain=plain, trim=config(**scan))
    model, blocks = trainer.model, trainer.model.model.layers
    trainer.train()
    truth = make(tmp_path / "truth", plain=plain, max_steps=4, trim=TrimConfig(5, drop_every="2", repair="none", **scan))
    truth.train()

    assert depths(trainer) == [(3, 5), (5, 4), (12, 5)]
    assert trainer.state.global_step == STEPS  # it went on, in vain, to heal
    assert trainer.model is model and model.model.layers is blocks and len(blocks) == model.config.num_hidden_layers == 5
    assert equal(model, truth.model)
    assert model.config.trim == truth.model.config.trim
    assert LayerMap.from_config(model.config).kept_layers == LayerMap.from_config(truth.model.config).kept_layers
    folders = sorted(folder.name for folder in (tmp_path / "stopped").iterdir())
    assert folders == ["_passing-4"]  # the last one that passed, and none before it
    trainer.save_model(str(tmp_path / "final"))
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path / "final"), truth.model)
    assert trainer.evaluate()["eval_score"] == 0.79
    trainer.train()  # a model that got layers back trains on


def test_between_saves_only_the_newest_model_that_passed_is_kept(tmp_path: Path) -> None:
    class Counts(TrainerCallback):
        def __init__(self) -> None:
            self.kept: list[list[str]] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.kept.append(sorted(folder.name for folder in Path(args.output_dir).glob("_passing-*")))

    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 5, "max_steps": 8}
    trainer = make(tmp_path, lambda depth, step: 0.8, config(target_layers=4), plain=True, **often)
    trainer.add_callback(counts := Counts())
    trainer.train()
    passed = [{int(name.removeprefix("_passing-")) for name in kept} for kept in counts.kept]
    for step in range(3, 9):  # of the evaluation before; and the one that the checkpoint of step 5 names
        assert passed[step - 1] == {step - 1} | ({5} if step > 5 else set())


def test_halves_of_layers_come_back(tmp_path: Path) -> None:
    scan: dict[str, Any] = {"unit": "sublayer", "importance": "sensitivity", "calibration_size": 8}
    trainer = make(tmp_path / "stopped", trim=config(**scan, target_layers=9))
    trainer.compute_metrics = lambda _: {"score": {12: 0.8, 11: 0.79}.get(halves(trainer), 0.5)}
    trainer.train()
    truth = make(tmp_path / "truth", max_steps=4, trim=TrimConfig(11, drop_every="2", repair="none", **scan))
    truth.compute_metrics = None
    truth.train()
    assert depths(trainer) == [(3, 11), (5, 10), (12, 11)]
    assert halves(trainer) == 11 and trainer.model.config.trim == truth.model.config.trim
    assert equal(trainer.model, truth.model)


def halves(trainer: Trainer) -> int:
    return LayerMap.from_config(trainer.model.config).num_units("sublayer")


def test_the_card_tells_of_the_model_that_the_run_ended_with(tmp_path: Path) -> None:
    score = {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = make(tmp_path / "run", trim=config(stop_metric=None), **score)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    report = json.loads((tmp_path / "final" / "trim_report.json").read_text())
    assert {quality["metric"]: quality["trimmed"]["value"] for quality in report["quality"]}["score"] == 0.79
    assert (report["training"]["steps"], report["training"]["healed_steps"]) == (4, 2)
    assert report["trimmed"]["map"]["kept_layers"] == [0, 1, 2, 3, 5]


def test_a_first_drop_that_fails_gives_the_full_depth_back(tmp_path: Path) -> None:
    trainer = make(tmp_path / "stopped", score=lambda depth, step: depth / 10, plain=True)
    trainer.train()
    full = Trainer(tiny_model(), arguments(tmp_path / "full", max_steps=2), train_dataset=tiny_texts())
    full.train()
    assert depths(trainer) == [(3, 5), (12, 6)]
    assert equal(trainer.model, full.model)
    assert LayerMap.from_config(trainer.model.config).kept_layers == tuple(range(6))


def test_a_model_that_heals_is_what_the_run_ends_with(tmp_path: Path) -> None:
    trainer = make(tmp_path, score=lambda depth, step: 0.8 if step >= 10 else BY_DEPTH[depth])
    trainer.train()
    assert depths(trainer) == [(3, 5), (5, 4)]  # stopped all the same
    assert trainer.model.config.num_hidden_layers == 4
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path / "_passing-12"), trainer.model)


def test_a_model_that_healed_and_fell_again_is_given_back(tmp_path: Path) -> None:
    """At one depth all along: only the weights go back."""
    trainer = make(
        tmp_path,
        score=lambda depth, step: 0.8 if step in (10, 11) else BY_DEPTH[depth],
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    assert trainer.model.config.num_hidden_layers == 4
    assert equal(trainer.model, LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-10"))


def test_lower_is_better_for_a_loss_and_as_the_arguments_say(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert watched_metric(config(stop_metric=None), args) == ("loss", False)
    assert watched_metric(config(stop_metric="eval_accuracy"), args) == ("accuracy", True)
    assert watched_metric(config(stop_metric="med_loss"), args) == ("med_loss", False)
    args = arguments(tmp_path, metric_for_best_model="wer", greater_is_better=False)
    assert watched_metric(config(stop_metric=None), args) == ("wer", False)
    assert watched_metric(config(stop_metric="f1"), args) == ("f1", True)
    trainer = make(
        tmp_path,
        score=lambda depth, step: {6: 2.0, 5: 2.04, 4: 2.06}[depth],
        metric_for_best_model="score",
        greater_is_better=False,
    )
    trainer.train()
    assert depths(trainer) == [(3, 5), (5, 4), (12, 5)]


def test_with_a_given_reference_the_first_drop_waits(tmp_path: Path) -> None:
    """The metric grows by 0.1 a step: it is within 0.1 of 0.6 after step 5, the user's evaluation."""
    trim = config(reference_metric=0.6, max_metric_drop=0.1)
    trainer = make(tmp_path, score=lambda depth, step: step / 10, trim=trim, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert depths(trainer) == [(6, 5), (8, 4), (10, 3)]  # then as far apart as planned
    assert trainer.model.config.num_hidden_layers == 3


def test_a_reference_that_is_never_reached_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("trimllm_hf.training.stop_rules.logger.warning", said.append)
    trainer = make(tmp_path, trim=config(reference_metric=0.95))
    trainer.train()
    assert depths(trainer) == [] and trainer.model.config.num_hidden_layers == 6
    assert len(said) == 1 and "No layer was dropped" in said[0] and "the reference (0.95)" in said[0]


def test_evaluations_are_made_before_each_drop_and_at_the_end(tmp_path: Path) -> None:
    trainer = make(tmp_path, score=lambda depth, step: 0.8)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_score" in entry]
    assert evaluated == [2, 4, 6, 12]
    assert depths(trainer) == [(3, 5), (5, 4), (7, 3)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that saved at each step, what it kept as passing after each save, and its final model."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for passing in folder.glob("_passing-*"):
                shutil.copytree(passing, folder / f"kept-{state.global_step}" / passing.name)

    trainer = make(folder, save_strategy="steps", save_steps=1)
    trainer.add_callback(Keep)
    trainer.train()
    return folder, trainer.model


@pytest.mark.parametrize("step", [2, 3, 4, 6, 9], ids=["at the reference", "between", "passed", "failed", "healing"])
def test_resume_ends_with_the_same_bits(step: int, uninterrupted: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = uninterrupted
    kept = folder / f"kept-{step}"
    assert [passing.name for passing in kept.iterdir()] == [f"_passing-{2 if step < 4 else 4}"]
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert depths(resumed)[-1] == (12, 5)
    assert equal(resumed.model, model)


def test_resume_without_the_model_that_passed_is_refused(uninterrupted: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"had passed by this checkpoint in .*_passing-4, got no such folder"):
        make(tmp_path).train(resume_from_checkpoint=str(uninterrupted[0] / "checkpoint-6"))


# ---- bad input: refused when training begins, nothing changed


@pytest.mark.parametrize(
    ("trim", "changes", "said"),
    [
        ({}, {"eval_dataset": None}, "Expected an eval_dataset for max_metric_drop, got none"),
        (
            {},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end=False with max_metric_drop",
        ),
        ({"stop_metric": "acuracy"}, {}, r"metric 'acuracy' \(stop_metric\).*got \['loss',.*'score'"),
    ],
)
def test_a_run_that_could_not_be_judged_is_refused(trim: dict, changes: dict, said: str, tmp_path: Path) -> None:
    no_data = "eval_dataset" in changes
    trainer = make(tmp_path, trim=config(**trim), **{name: value for name, value in changes.items() if not no_data})
    if no_data:
        trainer.eval_dataset = None
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert trainer.model.config.num_hidden_layers == 6 and not hasattr(trainer.model.config, "trim")


def test_a_reference_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number for the reference at full depth, got nan at step 2"):
        make(tmp_path, score=lambda depth, step: float("nan")).train()


def test_an_engine_that_cannot_give_layers_back_is_refused(tmp_path: Path) -> None:
    sharded: Any = SimpleNamespace(restores_layers=False)
    with pytest.raises(ValueError, match="cuts parameters into shards"):
        MetricRule(config(), make(tmp_path), sharded, {}, {})
