"""`trainable_ratio`: exactly so many blocks train, the most important ones, chosen once before the optimizer is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainerCallback

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer, score_layers
from trimllm_hf.importance.order import choose
from trimllm_hf.training.sparse_update import check_room, train_only


def trainer_of(folder: Path, model: Any = None, trim: TrimConfig | None = None, **changes: Any) -> TrimTrainer:
    model = model if model is not None else tiny_model()
    callbacks = changes.pop("callbacks", None)
    settings = arguments(folder, **changes)
    return TrimTrainer(
        model, settings, train_dataset=tiny_texts(), trim=trim or config(trainable_ratio=0.5), callbacks=callbacks
    )


def trained_layers(model: Any) -> list[int]:
    """Positions of the blocks that train; every parameter of a block does, or none."""
    found = []
    for position, block in enumerate(model.model.layers):
        states = {parameter.requires_grad for parameter in block.parameters()}
        assert len(states) == 1
        found += [position] if states == {True} else []
    return found


@pytest.mark.parametrize(
    ("ratio", "layers", "count"),
    [(0.25, 32, 8), (0.25, 6, 2), (0.25, 5, 1), (0.5, 5, 3), (0.01, 6, 1), (1.0, 6, 6), (1 / 3, 12, 4), (0.3, 5, 2)],
)
def test_the_count_is_exact(ratio: float, layers: int, count: int) -> None:
    assert TrimConfig(target_layers=2, trainable_ratio=ratio).resolve_trainable(layers) == count


class Watch(TrainerCallback):
    """What trains, and what the optimizer holds, at each step."""

    def __init__(self) -> None:
        self.trained: dict[int, list[int]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = {id(parameter): parameter.clone() for parameter in model.parameters()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert held == trainable and {id(parameter) for parameter in optimizer.state} == trainable
        for parameter in model.parameters():
            changed = not torch.equal(parameter, self.start[id(parameter)])
            assert changed == parameter.requires_grad
        kept = (getattr(model.config, "trim", None) or {"kept_layers": range(6)})["kept_layers"]
        self.trained[state.global_step] = [kept[position] for position in trained_layers(model)]


def test_the_most_important_blocks_train_and_the_others_go_first(tmp_path: Path) -> None:
    watch = Watch()
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, callbacks=[watch])
    calibration = [{name: value[None] for name, value in example.items()} for example in trainer.calibration_dataset]
    expected = sorted(score_layers(tiny_model(), calibration).argsort()[3:].tolist())  # half of six
    trainer.train()
    assert set(map(tuple, watch.trained.values())) == {tuple(expected)} and len(watch.trained) == 12
    assert set(expected) <= set(model.config.trim["kept_layers"])
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert not embeddings.requires_grad and head.requires_grad and model.model.norm.weight.requires_grad


def test_a_run_equals_one_with_the_same_layers_frozen_by_hand(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trainer_of(tmp_path / "one", model)
    trainer.train()
    layers = trainer.callback_handler.callbacks[-1].record.trained_layers
    by_hand = tiny_model()
    for position, block in enumerate(by_hand.model.layers):
        block.requires_grad_(position in layers)
    by_hand.get_input_embeddings().requires_grad_(False)
    callback = TrimCallback(config(), calibration_dataset=trainer.calibration_dataset)
    callback.support.trained_layers = layers  # those that go last
    other = Trainer(by_hand, arguments(tmp_path / "other"), train_dataset=trainer.train_dataset, callbacks=[callback])
    other.train()
    assert losses(other) == losses(trainer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in by_hand.state_dict().items())


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head(embeddings: bool, head: bool, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    train_only(model, [1, 4], config(train_embeddings=embeddings, train_head=head))
    assert trained_layers(model) == [1, 4]
    assert model.model.embed_tokens.weight.requires_grad == embeddings
    assert model.lm_head.weight.requires_grad == (embeddings if tied else head)
    assert model.model.norm.weight.requires_grad == head


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_positions_are_embeddings_and_a_fresh_head_trains(family: str) -> None:
    model = tiny_model(family)
    train_only(model, [0], config())
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if family == "gpt2":
        assert {name for name in trains if ".h." not in name} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    else:
        assert "classifier.weight" in trains
        assert not any(name.endswith("_embeddings.weight") for name in trains)


def test_what_was_frozen_stays_frozen() -> None:
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    train_only(model, [1, 4], config(train_embeddings=True))
    assert not model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad


def test_of_adapters_those_of_the_chosen_blocks_train(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    layers = trainer.callback_handler.callbacks[-1].record.trained_layers
    assert len(layers) == 3
    kept = model.config.trim["kept_layers"]
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {
        f"base_model.model.model.layers.{kept.index(layer)}.self_attn.q_proj.lora_{half}.default.weight"
        for layer in layers
        for half in "AB"
    }


@pytest.mark.parametrize("step", [2, 4, 8], ids=["before", "between", "after"])
def test_resume_trains_the_same_blocks(step: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = trainer_of(folder, tiny_model(attention_dropout=0.1), save_strategy="steps", save_steps=2)
    trainer.train()
    expected = trainer.model.state_dict()
    again = trainer_of(tmp_path / "again", tiny_model(attention_dropout=0.1))
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    result = again.model.state_dict()
    assert (
        again.callback_handler.callbacks[-1].record.trained_layers
        == trainer.callback_handler.callbacks[-1].record.trained_layers
    )
    assert result.keys() == expected.keys() and all(torch.equal(result[name], expected[name]) for name in expected)


def test_resume_with_another_setting_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path / "sparse", save_strategy="steps", save_steps=4).train()
    trainer_of(tmp_path / "full", trim=config(), save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match=r"checkpoint of a run with trainable_ratio, got .*in which all layers train"):
        trainer_of(tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"doesn't match the size|trainable_ratio of the run that is resumed"):
        trainer_of(tmp_path / "b", trim=config()).train(resume_from_checkpoint=str(tmp_path / "sparse" / "checkpoint-4"))


def test_trained_blocks_go_last_and_never_all() -> None:
    scores = torch.tensor([5.0, 1.0, 2.0, 3.0, 0.5, 4.0])
    assert choose(scores, 1, 1, 1, spared=[1, 4]).positions == [2]
    assert choose(scores, 1, 1, 1, spared=[1, 2, 3, 4]).positions == [4]  # no other may go
    three = choose(scores, 3, 1, 1, spared=[1, 3, 4])
    assert (three.positions, three.scores) == ([1, 2, 4], [1.0, 2.0, 0.5])
    check_room([1, 2, 3], 6, 3, config(target_layers=3))  # 4 goes, then two of the three
    check_room([0, 5], 6, 2, config())
    with pytest.raises(ValueError, match=r"leaves a block that trains, got 2 of 6 layers: besides the 2.*only 2 may"):
        check_room([2, 3], 6, 2, config(trainable_ratio=0.3))


# ---- bad input


def test_a_bare_callback_comes_too_late(tmp_path: Path) -> None:
    callback = TrimCallback(config(trainable_ratio=0.5))
    with pytest.raises(ValueError, match=r"TrimTrainer .*for trainable_ratio=0.5, got a TrimCallback in another Trainer"):
        Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[callback])


def test_an_optimizer_that_is_made_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"the Trainer to make the optimizer, with trainable_ratio=0.5"):
        TrimTrainer(
            model,
            arguments(tmp_path),
            train_dataset=tiny_texts(),
            optimizers=(optimizer, None),
            trim=config(trainable_ratio=0.5),
        )
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_a_share_outside_of_the_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="trainable_ratio above 0 and up to 1"):
        config(trainable_ratio=ratio)


def test_gradients_of_frozen_layers_are_not_to_be_had(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, trim=config(trainable_ratio=0.5, importance="taylor"))
    with pytest.raises(ValueError, match=r"all weights of the layers to train, .*got frozen ones .*another importance"):
        trainer.train()
    assert trainer.model.config.num_hidden_layers == 6


def test_half_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="unit='block' with trainable_ratio"):
        config(trainable_ratio=0.5, unit="sublayer")


def test_a_score_of_windows_says_nothing_of_a_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"score of single layers for trainable_ratio=0.5, got 'angular'"):
        trainer_of(tmp_path, trim=config(trainable_ratio=0.5, importance="angular", layers_per_drop=2))


def test_a_chosen_block_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=r"to have parameters that train, got none in \[.*requires_grad"):
        trainer_of(tmp_path, model).train()
    assert model.lm_head.weight.requires_grad and model.config.num_hidden_layers == 6
