"""One callback for several runs: what a run is belongs to the run. And what is refused, or said, when one begins or ends."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from trimllm_hf import TrimCallback, TrimTrainer, drop_layers, register_importance, trim_like

SAVES = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def trainer_of(folder: Path, model: Any, *callbacks: Any, model_init: Any = None, **changes: Any) -> Trainer:
    given: dict[str, Any] = {"train_dataset": tiny_texts(40), "eval_dataset": tiny_texts(8, seed=9)}
    given |= {"callbacks": list(callbacks), "model_init": model_init}
    return Trainer(model, arguments(folder, **{"max_steps": 6, **changes}), **given)


def quick(**changes: Any) -> TrimCallback:
    return TrimCallback(config(**{"drop_every": "2", "importance": "last", **changes}))


class StopAt(TrainerCallback):
    """Ends a run early, as early stopping, a time limit or Ctrl-C do."""

    def __init__(self, step: int, error: type[BaseException] | None = None) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("trimllm_hf.training.run.logger.warning", found.append)
    return found


# ---- several runs


def test_a_callback_in_each_fold_trims_each_model_as_one_of_its_own_would(tmp_path: Path) -> None:
    shared, held = quick(), []
    for fold in range(2):
        one, other = tiny_model(seed=fold), tiny_model(seed=fold)
        held.append(trainer_of(tmp_path, one, shared))  # the Trainers before stay alive
        held[-1].train()
        trainer_of(tmp_path, other, quick()).train()
        assert one.config.num_hidden_layers == 4
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_cell_that_is_run_again_after_ctrl_c_trims_the_new_model(tmp_path: Path) -> None:
    shared, first, second = quick(), tiny_model(), tiny_model(seed=1)
    abandoned = trainer_of(tmp_path, first, shared, StopAt(3, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        abandoned.train()
    assert first.config.num_hidden_layers == 5
    trainer_of(tmp_path, second, shared).train()
    assert second.config.num_hidden_layers == 4 and first.config.num_hidden_layers == 5


def test_a_second_train_goes_on_at_the_depth_that_the_first_reached(tmp_path: Path) -> None:
    model, callback = tiny_model(), quick()
    trainer = trainer_of(tmp_path, model, callback)
    trainer.train()
    assert callback.record is not None
    callback.record.model_step, callback.record.trained_layers = 3, [1]  # as a stop rule and a sparse update note them
    trainer.train()
    assert model.config.num_hidden_layers == 4 and len(losses(trainer)) == 6
    assert callback.record.model_step is None and callback.record.trained_layers is None
    gc.collect()


def test_two_models_of_one_config_object(tmp_path: Path) -> None:
    shared, first = quick(), tiny_model()
    second = LlamaForCausalLM(first.config)
    trainer_of(tmp_path, first, shared).train()
    assert second.config.num_hidden_layers == 6 and getattr(second.config, "trim", None) is None
    trainer_of(tmp_path, second, shared).train()
    assert [len(model.model.layers) for model in (first, second)] == [4, 4]


def test_models_that_are_made_one_after_the_other_of_one_config_object(tmp_path: Path) -> None:
    """As in a search for hyperparameters: nobody but the function that makes the models holds the config."""
    one = tiny_model().config
    trainer = trainer_of(tmp_path, None, quick(), model_init=lambda: LlamaForCausalLM(one))
    for _ in range(2):
        trainer.train()
        assert len(trainer.model.model.layers) == 4 and len(losses(trainer)) == 6
        assert one.num_hidden_layers == 6 and getattr(one, "trim", None) is None


@pytest.mark.parametrize("trimming", [True, False], ids=["TrimTrainer", "Trainer"])
def test_a_callback_that_the_trainer_makes_anew_goes_on_with_the_run(trimming: bool, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}

    def make(model: Any) -> Trainer:
        if not trimming:
            return trainer_of(tmp_path, model, quick(), **settings)
        args = arguments(tmp_path, **{"max_steps": 6, **settings})
        trim = config(drop_every="2", importance="random")
        return TrimTrainer(model, args, train_dataset=tiny_texts(40), trim=trim)

    whole = tiny_model()
    make(whole).train()
    resumed = tiny_model()
    if not trimming:
        trim_like(resumed, tmp_path / "checkpoint-2")
    make(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.config.trim == whole.config.trim
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_second_run_with_a_sparse_update_chooses_anew(tmp_path: Path) -> None:
    trim = config(drop_every="2", importance="random", trainable_ratio=0.5)
    model = tiny_model()
    trainer = TrimTrainer(model, arguments(tmp_path, max_steps=6), train_dataset=tiny_texts(40), trim=trim)
    trainer.train()
    trained = trainer.trim_callback().record.trained_layers
    trainer.train()
    again = trainer.trim_callback().record.trained_layers
    kept = list(model.config.trim["kept_layers"])
    assert len(trained) == 3 and len(again) == 2 and set(again) <= set(kept)
    trains = [layer for layer, block in zip(kept, model.model.layers, strict=True) if next(block.parameters()).requires_grad]
    assert trains == again


# ---- what can be known when training begins


@pytest.mark.parametrize(
    ("changes", "arithmetic"),
    [
        ({"target_layers": None, "target_ratio": 0.5}, "target_ratio=0.5 of the base's 6 layers, that is 3, .*has 3 of 6"),
        ({"target_layers": 3}, "target_layers=3, for a model that has 3 of 6: nothing is left to drop"),
    ],
)
def test_a_second_round_to_the_same_target_is_refused(changes: dict[str, Any], arithmetic: str, tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [2, 3, 4])
    with pytest.raises(ValueError, match=arithmetic):
        trainer_of(tmp_path, model, quick(**changes)).train()


@pytest.mark.parametrize("name", ["importance", "tie_breaker", "warm_up_importance"])
def test_a_score_that_fails_on_these_batches_fails_before_the_first_step(name: str, tmp_path: Path) -> None:
    def needs_pixels(model: Any, batches: Any, unit: str) -> Any:
        return torch.arange(6.0) * batches[0]["pixel_values"].mean(), 1.0

    register_importance(f"needs_pixels_{name}", needs_pixels)
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, quick(**{"importance": "sensitivity", name: f"needs_pixels_{name}"}))
    with pytest.raises(ValueError, match=r"by which 'needs_pixels_\w+' can score layers, got KeyError: 'pixel_values'"):
        trainer.train()
    assert trainer.state.global_step == 0 and model.config.num_hidden_layers == 6


def test_the_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    """A run whose first drop is behind its first steps has the losses of one without the callback until then."""
    plain, trimmed = (
        trainer_of(tmp_path, tiny_model(), *callbacks) for callbacks in ([], [quick(importance="sensitivity")])
    )
    plain.train()
    trimmed.train()
    assert losses(plain)[:2] == losses(trimmed)[:2]


# ---- the best checkpoint, and a run that ends early


def test_the_best_checkpoint_is_one_of_the_depth_that_was_reached(tmp_path: Path) -> None:
    model, scores = tiny_model(), iter([0.9, 0.5, 0.7, 0.6, 0.4])  # after steps 2, 4, …: layers go after 2 and 4
    given = {"train_dataset": tiny_texts(40), "eval_dataset": tiny_texts(8, seed=9), "callbacks": [quick()]}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True, "max_steps": 10}
    args = arguments(tmp_path, **SAVES, **best)
    trainer = Trainer(model, args, compute_metrics=lambda _: {"score": next(scores)}, **given)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6") and trainer.state.best_metric == 0.7
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert model.config.num_hidden_layers == 4
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def test_without_a_checkpoint_at_the_last_depth_the_last_step_is_kept(tmp_path: Path, said: list[str]) -> None:
    model = tiny_model()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 4, "eval_steps": 4}
    trim = quick(drop_every="5", target_layers=5)
    trainer = trainer_of(tmp_path, model, trim, StopAt(6), **{**SAVES, **best}, max_steps=8)
    trainer.train()
    assert model.config.num_hidden_layers == 5 and trainer.state.best_model_checkpoint is None
    assert any("No checkpoint with 5 layers was evaluated and saved" in line for line in said)


def test_a_run_that_ends_before_its_plan_is_done_says_so(tmp_path: Path, said: list[str]) -> None:
    model, callback = tiny_model(), quick()
    trainer_of(tmp_path, model, callback, StopAt(3)).train()
    assert model.config.num_hidden_layers == 5
    assert any("ended at step 3 of 6" in line and "has 5 layers, and 4 were asked for" in line for line in said)
    assert callback.record is not None and callback.record.target_num_layers == 4


def test_a_card_says_what_was_asked_for(tmp_path: Path) -> None:
    args, trim = arguments(tmp_path, max_steps=6), config(drop_every="2", importance="random")
    trainer = TrimTrainer(tiny_model(), args, train_dataset=tiny_texts(40), trim=trim, callbacks=[StopAt(3)])
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "5 of its 6 layers kept; 3 training steps" in card
    assert "dropping stopped before the target of 4 layers" in card


def test_a_folder_that_says_nothing_of_its_layers_is_no_checkpoint(tmp_path: Path) -> None:
    """What Accelerate's save_state writes: weights and states, and no config."""
    trained, model = tiny_model(), tiny_model()
    drop_layers(trained, [1, 3])
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Expected a folder that says which layers it holds.*none of trainer_state.json"):
        trim_like(model, tmp_path)
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
