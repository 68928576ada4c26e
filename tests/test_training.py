"""Trimming in an ordinary Trainer, one process: it goes on as if the smaller model had been trained all along."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, TrimTrainer, trim_like

STEPS = 12


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def config(**changes: Any) -> TrimConfig:
    # random tokens cannot be learned, and the scan is to be tested all the same
    scan = {"importance": "sensitivity", "repair": "none", "calibration_size": 8, "warm_up_importance": "none"}
    return TrimConfig(**{"target_layers": 4, "drop_every": "3", **scan, **changes})


class Recorder(TrainerCallback):
    """Watches a run from outside: batches in their order, parameters that left and still live, memory of the moments."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[torch.nn.Parameter]] = []
        self.alive: dict[int, int] = {}
        self.depths: dict[int, int] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.refs = [weakref.ref(parameter) for parameter in model.parameters()]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        now = {id(parameter) for parameter in model.parameters()}
        self.alive[state.global_step] = sum(1 for ref in self.refs if ref() is not None and id(ref()) not in now)
        self.depths[state.global_step] = model.config.num_hidden_layers
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == now
        assert {id(parameter) for parameter in optimizer.state} <= now


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(folder: Path, model: Any = None, trim: TrimConfig | None = None, **changes: Any) -> tuple[Trainer, Recorder]:
    recorder = Recorder()
    callbacks = [TrimCallback(trim or config()), recorder]
    trainer = Trainer(
        model if model is not None else tiny_model(),
        arguments(folder, **changes),
        train_dataset=tiny_texts(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer, recorder


def reference(batches: list[dict[str, torch.Tensor]], history: list[dict[str, Any]]) -> tuple[list[float], LlamaForCausalLM]:
    """By hand and with torch alone: at each drop a fresh smaller model and a fresh AdamW, weights and moments copied."""

    def groups(model: LlamaForCausalLM) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        decayed = [p for name, p in named if "norm" not in name]
        return [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
        ]

    def smaller(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, position: int) -> tuple[Any, Any]:
        old_config = model.config.to_dict()
        old_config.pop("trim", None)
        fresh = LlamaForCausalLM(
            type(model.config)(**{**old_config, "num_hidden_layers": model.config.num_hidden_layers - 1})
        )
        stay = [i for i in range(model.config.num_hidden_layers) if i != position]
        source = dict(model.named_parameters())
        new_optimizer = torch.optim.AdamW(groups(fresh), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=True)
        for name, parameter in fresh.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                parts[2] = str(stay[int(parts[2])])
            old = source[".".join(parts)]
            parameter.data.copy_(old.data)
            new_optimizer.state[parameter] = {key: value.clone() for key, value in optimizer.state[old].items()}
        return fresh, new_optimizer

    model: Any = tiny_model()
    model.train()
    kept = list(range(6))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=True)
    seen = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (STEPS - step) / STEPS
        pair = batches[2 * step : 2 * step + 2]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        total = torch.tensor(0.0)
        for batch in pair:
            loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total.item())
        for record in history:
            if record["step"] == step + 1:
                (layer,) = record["dropped"]
                model, optimizer = smaller(model, optimizer, kept.index(layer))
                model.train()
                kept.remove(layer)
    return seen, model


def test_equals_an_independent_reference_to_the_last_bit(tmp_path: Path) -> None:
    batches: list[dict[str, torch.Tensor]] = []

    class Recording(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Recording(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    trainer.train()
    history = trainer.model.config.trim["history"]
    assert [record["step"] for record in history] == [3, 6]
    expected, model = reference(batches, history)
    assert losses(trainer) == expected
    mine = dict(trainer.model.named_parameters())
    assert all(torch.equal(mine[name], parameter) for name, parameter in model.named_parameters())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3 * (STEPS - step) / STEPS for step in range(STEPS)])


def test_dropped_parameters_are_gone_one_step_later_and_objects_stay(tmp_path: Path) -> None:
    model = tiny_model()
    blocks = model.model.layers
    trainer, recorder = train(tmp_path, model)
    assert [recorder.alive[step] for step in (4, 7)] == [0, 0]
    assert recorder.depths == {step: 6 - (step >= 3) - (step >= 6) for step in range(1, STEPS + 1)}
    assert trainer.model is model and model.model.layers is blocks


def test_the_trackers_see_the_depth_and_every_loss(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "trim/num_layers" in entry]
    assert [(entry["step"], entry["trim/num_layers"]) for entry in logged] == [(3, 5), (6, 4)]
    assert logged[-1]["trim/parameters"] == sum(parameter.numel() for parameter in trainer.model.parameters())
    assert len(losses(trainer)) == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"num_train_epochs": 1, "max_steps": -1},
    ],
    ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values()))),
)
def test_trains_on_with(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, tiny_model(tie_word_embeddings=True), **changes)
    assert trainer.model.config.num_hidden_layers == 4
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    states = [state for state in trainer.optimizer.state.values() if state]
    assert len(states) == len(list(trainer.model.parameters()))


def test_a_users_optimizer_with_a_group_for_each_layer(tmp_path: Path) -> None:
    """A group goes with its layer, and what the scheduler keeps for it."""
    model = tiny_model()
    inside = {id(parameter) for parameter in model.model.layers.parameters()}
    groups = [{"params": list(block.parameters()), "lr": 1e-3} for block in model.model.layers]
    groups.append({"params": [p for p in model.parameters() if id(p) not in inside], "lr": 1e-4})
    optimizer = Adafactor(groups, scale_parameter=False, relative_step=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=tiny_texts(),
        callbacks=[TrimCallback(config())],
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    assert [len(group["params"]) for group in optimizer.param_groups] == [9, 9, 9, 9, 3]
    assert len(scheduler.get_last_lr()) == 5


def test_training_draws_the_same_random_numbers(tmp_path: Path) -> None:
    """A score that draws and a scan leave every generator as it was."""
    drawn = []
    for name, callbacks in (
        ("plain", []),
        ("scan", [TrimCallback(config())]),
        ("random", [TrimCallback(config(importance="random"))]),
    ):
        trainer = Trainer(tiny_model(), arguments(tmp_path / name), train_dataset=tiny_texts(), callbacks=callbacks)
        trainer.train()
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 1


def test_map_state_and_weights_agree_at_every_save(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=1)
    depths = []
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"checkpoint-{step}"
        layer_map = LayerMap.from_checkpoint(folder)  # raises where config.json and trainer_state.json disagree
        model = LlamaForCausalLM.from_pretrained(folder)
        of_config = LayerMap.from_config(model.config)
        assert layer_map.kept_layers == of_config.kept_layers
        assert len(model.model.layers) == layer_map.num_layers
        depths.append(layer_map.num_layers)
    assert depths == [6, 6, 5, 5, 5] + [4] * 7


# ---- TrimTrainer: calibration, resume, best model


def trim_trainer(folder: Path, model: Any = None, trim: TrimConfig | None = None, **changes: Any) -> TrimTrainer:
    settings = {"save_strategy": "steps", "save_steps": 2, **changes}
    dataset = settings.pop("train_dataset", tiny_texts())
    evaluation = settings.pop("eval_dataset", None)
    return TrimTrainer(
        model if model is not None else tiny_model(attention_dropout=0.1),
        arguments(folder, **settings),
        train_dataset=dataset,
        eval_dataset=evaluation,
        trim=trim or config(),
    )


def test_calibration_examples_leave_the_training_set(tmp_path: Path) -> None:
    trainer = trim_trainer(tmp_path)
    texts = {tuple(example["input_ids"].tolist()) for example in tiny_texts()}
    held = {tuple(example["input_ids"].tolist()) for example in trainer.calibration_dataset}
    rest = {tuple(example["input_ids"].tolist()) for example in trainer.train_dataset}
    assert len(held) == 8 and held | rest == texts and not held & rest


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_streaming_set_loses_its_first_examples(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny_texts())

    def rows():
        for example in tiny_texts():
            yield {name: value.tolist() for name, value in example.items()}

    stream = Stream() if kind == "torch" else datasets.IterableDataset.from_generator(rows)
    trainer = trim_trainer(tmp_path, train_dataset=stream)
    first = [list(map(int, example["input_ids"])) for example in trainer.calibration_dataset]
    assert first == [example["input_ids"].tolist() for example in tiny_texts()[:8]]
    assert list(map(int, next(iter(trainer.train_dataset))["input_ids"])) == tiny_texts()[8]["input_ids"].tolist()
    trainer.train()
    assert trainer.model.config.num_hidden_layers == 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = trim_trainer(folder)
    trainer.train()
    return folder, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("step", [2, 4, 8], ids=["before", "between", "after"])
def test_resume_ends_with_the_same_bits(step: int, uninterrupted: Any, tmp_path: Path) -> None:
    """Also when killed between a drop and the next save: checkpoint 2 is from before the drop at 3, 4 from before 6."""
    folder, expected = uninterrupted
    trainer = trim_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    result = trainer.model.state_dict()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert [record["step"] for record in trainer.model.config.trim["history"]] == [3, 6]


def test_resume_passes_over_a_half_written_checkpoint(uninterrupted: Any, tmp_path: Path) -> None:
    folder, expected = uninterrupted
    import shutil

    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-12" / "trainer_state.json").unlink()
    torn = tmp_path / "run" / "checkpoint-10" / "trainer_state.json"
    torn.write_text(torn.read_text()[:50])
    trainer, recorder = trim_trainer(tmp_path / "run"), Recorder()
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=True)
    assert min(recorder.depths) == 9  # the first step after checkpoint-8
    assert all(torch.equal(trainer.model.state_dict()[name], expected[name]) for name in expected)


def test_plain_trainer_resumes_a_model_trimmed_like_the_checkpoint(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, save_strategy="steps", save_steps=4)
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    model = tiny_model()
    trim_like(model, tmp_path / "checkpoint-8")
    resumed = Trainer(model, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(resumed.model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"], ids=["one file", "sharded"])
def test_plain_trainer_refuses_to_resume_onto_another_depth(max_shard_size: str, tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-8"
    if max_shard_size != "5GB":
        (checkpoint / "model.safetensors").unlink()
        LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-12").save_pretrained(
            checkpoint, max_shard_size=max_shard_size
        )
    resumed = Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    with pytest.raises(ValueError, match=r"checkpoint of the model's 6 layers.*trim_like|doesn't match the size"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_trainer_state_holds_the_settings(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=12)
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["TrimCallback"]
    assert TrimConfig(**saved["args"]["config"]) == config()
    gc.collect()


# ---- bad input: refused when training begins, nothing changed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_layers": 6}, "below the model's depth, got target_layers=6 for a model of 6"),
        ({"target_layers": 9}, "below the model's depth"),
        ({"target_layers": 1}, "at least the 2 protected layers"),
        (
            {"drop_every": "6"},
            r"6 - 4 = 2 layers to drop.*2 drops, every 6 steps: the last one after step 12, but the run has 12",
        ),
        ({"importance": "sensitivty"}, r"importance among \['activation_norm'.*got 'sensitivty'"),
        ({"calibration_size": 120}, "at least 121 training examples.*got 120"),
    ],
)
def test_what_cannot_be_reached_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        trim_trainer(tmp_path, model, config(**changes)).train()
    assert model.config.num_hidden_layers == 6 and not hasattr(model.config, "trim")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_optimizer_that_hides_parameters_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=tiny_texts(),
        callbacks=[TrimCallback(config())],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(ValueError, match="state per parameter, got LBFGS"):
        trainer.train()
    assert model.config.num_hidden_layers == 6


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one TrimCallback"):
        TrimTrainer(
            tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), trim=config(), callbacks=[TrimCallback(config())]
        )
    several = [TrimCallback(config()), TrimCallback(config())]
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=several)
    with pytest.raises(ValueError, match=r"one TrimCallback, got 2.*train twice"):
        trainer.train()
    assert trainer.state.global_step == 0 and not hasattr(trainer.model.config, "trim")
