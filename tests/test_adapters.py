"""Adapters (PEFT): they lose layers with their base, and are not put on a base of another depth by anybody."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback

from trimllm_hf import LayerMap, TrimCallback, TrimTrainer, drop_layers, score_layers, trim_like

peft = pytest.importorskip("peft", reason="PEFT is not installed")

STEPS = 12


def with_lora(base: Any = None, **changes: Any) -> Any:
    """A tiny model with LoRA, its weights random: with PEFT's own start the adapter would do nothing at first."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(5)
    return peft.get_peft_model(base or tiny_model(), peft.LoraConfig(**{**settings, **changes})).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


# ---- what is saved


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every linear layer": {"target_modules": "all-linear"},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "no task type": {"task_type": None},
    "some layers": {"layers_to_transform": [0, 2, 3, 4]},
    "patterns of numbers": {
        "rank_pattern": {"layers.2.self_attn.q_proj": 8, "layers.4.self_attn.v_proj": 2, "layers.3.self_attn.q_proj": 6},
        "alpha_pattern": {"layers.4.*q_proj": 64},
    },
    "an expression": {"target_modules": r".*layers\.[0-3]\.self_attn\.q_proj"},
    "modules by number": {"target_modules": ["layers.1.self_attn.q_proj", "layers.5.mlp.up_proj"]},
    "modules left out": {"exclude_modules": r".*layers\.2\..*"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_finds_its_layers_again(kind: str, tmp_path: Path) -> None:
    model = with_lora(**KINDS[kind])
    drop_layers(model, [3])
    layer_map = drop_layers(model, [1])  # after one drop its config is renumbered, and renumbered again
    assert layer_map.kept_layers == (0, 2, 4, 5)
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_model()
    assert trim_like(base, tmp_path / "adapter").kept_layers == (0, 2, 4, 5)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert torch.equal(logits(stock), logits(merged))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert LayerMap.from_config(stock.config).kept_layers == (0, 2, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_refuses_the_full_base(kind: str, tmp_path: Path) -> None:
    """Without our help: PEFT would else put the adapter on the first layers, and compute another function."""
    model = with_lora(**KINDS[kind])
    drop_layers(model, [1, 3])
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.model.layers.4"):
        peft.PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_transformers_and_autopeft_refuse_the_full_base(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    drop_layers(model, [1, 3])
    model.save_pretrained(tmp_path / "adapter")
    for load in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        with pytest.raises(RuntimeError, match="mismatch"):
            load.from_pretrained(tmp_path / "adapter")


def test_the_scores_of_a_model_with_adapters_are_those_of_the_merged_one() -> None:
    model = with_lora(task_type=None)  # then PEFT's class says nothing of the model's
    batches = [{"input_ids": tokens(2, seed=seed), "labels": tokens(2, seed=seed)} for seed in (1, 2)]
    scores = score_layers(model, batches)
    torch.testing.assert_close(scores, score_layers(model.merge_and_unload(), batches), rtol=1e-5, atol=1e-5)


def test_other_adapters_stay_what_they_are(tmp_path: Path) -> None:
    model = with_lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    drop_layers(model, [4])
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    base = tiny_model()
    trim_like(base, tmp_path / "other")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "other")), logits(model))


# ---- training


class Watch(TrainerCallback):
    """Before and after TrimCallback's turn: adapter weights and their state, by the parameter object."""

    def __init__(self, name: str, seen: dict[str, Any]) -> None:
        self.name, self.seen = name, seen

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.refs = [weakref.ref(parameter) for parameter in model.parameters()]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.name == "after":
            assert held == {id(parameter) for parameter in trained}
            assert {id(parameter) for parameter in optimizer.state} == held
        if state.global_step in (3, 6):
            values = {id(p): [p.detach(), *optimizer.state[p].values()] for p in trained}
            self.seen[f"{self.name} {state.global_step}"] = {
                key: [value.clone() for value in tensors] for key, tensors in values.items()
            }
        if state.global_step in (4, 7):
            now = {id(parameter) for parameter in model.parameters()}
            alive = sum(1 for ref in self.refs if ref() is not None and id(ref()) not in now)
            self.seen[f"alive {state.global_step}"] = alive


def test_training_goes_on_with_the_adapters_of_the_layers_that_stay(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    callbacks = [Watch("before", seen), TrimCallback(config()), Watch("after", seen)]
    model = with_lora()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=callbacks)
    trainer.train()
    assert seen["alive 4"] == seen["alive 7"] == 0
    for step, layers in ((3, 5), (6, 4)):
        before, after = seen[f"before {step}"], seen[f"after {step}"]
        assert len(before) == 4 * (layers + 1) and len(after) == 4 * layers
        assert all(torch.equal(a, b) for key in after for a, b in zip(before[key], after[key], strict=True))


def reference(batches: list[dict[str, torch.Tensor]], history: list[dict[str, Any]]) -> tuple[list[float], Any]:
    """By hand: at each drop a smaller base with new adapters and a new AdamW; weights and moments copied by name."""
    model, kept = with_lora(), list(range(6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.1, fused=True)
    seen = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (STEPS - step) / STEPS
        pair = batches[2 * step : 2 * step + 2]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        model.train()
        total = torch.tensor(0.0)
        for batch in pair:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total.item())
        for record in history:
            if record["step"] != step + 1:
                continue
            position = kept.index(record["dropped"][0])
            kept.pop(position)
            plain = {name: value for name, value in model.config.to_dict().items() if name != "trim"}
            smaller = LlamaForCausalLM(type(model.config)(**{**plain, "num_hidden_layers": len(kept)}))
            fresh = with_lora(smaller)
            stay = [i for i in range(len(kept) + 1) if i != position]
            source, states = dict(model.named_parameters()), optimizer.state
            trained = [p for p in fresh.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.1, fused=True)
            for name, parameter in fresh.named_parameters():
                parts = name.split(".")
                if "layers" in parts:
                    parts[4] = str(stay[int(parts[4])])
                old = source[".".join(parts)]
                parameter.data.copy_(old.data)
                if parameter.requires_grad:
                    optimizer.state[parameter] = {key: value.clone() for key, value in states[old].items()}
            model = fresh
    return seen, model


def test_equals_an_independent_reference_to_the_last_bit(tmp_path: Path) -> None:
    batches: list[dict[str, torch.Tensor]] = []

    class Recording(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    model = with_lora()
    trainer = Recording(model, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    trainer.train()
    expected, final = reference(batches, model.config.trim["history"])
    assert len(losses(trainer)) == STEPS and losses(trainer) == expected
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[name], parameter) for name, parameter in final.named_parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("lora")
    trainer = trim_trainer(folder, with_lora())
    trainer.train()
    return folder, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def trim_trainer(folder: Path, model: Any, **changes: Any) -> TrimTrainer:
    settings = arguments(folder, save_strategy="steps", save_steps=2, **changes)
    return TrimTrainer(model, settings, train_dataset=tiny_texts(), trim=config())


def test_every_checkpoint_holds_the_adapter_and_its_map(run: Any) -> None:
    folder, _ = run
    depths = []
    for step in range(2, STEPS + 1, 2):
        checkpoint = folder / f"checkpoint-{step}"
        layer_map = LayerMap.from_checkpoint(checkpoint)
        assert (checkpoint / "trim_map.json").is_file() == bool(layer_map.dropped_layers)
        assert not (checkpoint / "config.json").exists()
        depths.append(layer_map.num_layers)
    assert depths == [6, 5, 4, 4, 4, 4]


@pytest.mark.parametrize("step", [2, 4, 8], ids=["before", "between", "after"])
@pytest.mark.parametrize("kind", ["TrimTrainer", "Trainer"])
def test_resume_ends_with_the_same_bits(kind: str, step: int, run: Any, tmp_path: Path) -> None:
    folder, expected = run
    checkpoint = str(folder / f"checkpoint-{step}")
    model = with_lora()
    if kind == "TrimTrainer":
        trainer: Trainer = trim_trainer(tmp_path, model)
    else:  # what a user of the callback has to do, with the base or with the PeftModel
        trim_like(model, checkpoint)
        whole = trim_trainer(tmp_path, with_lora())
        callback = TrimCallback(config(), calibration_dataset=whole.calibration_dataset)
        settings = arguments(tmp_path, restore_callback_states_from_checkpoint=False)
        trainer = Trainer(model, settings, train_dataset=whole.train_dataset, callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint)
    result = model.state_dict()
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("callbacks", [True, False], ids=["with the callback", "stock"])
def test_resume_onto_another_depth_is_refused(callbacks: bool, run: Any, tmp_path: Path) -> None:
    """Also by a stock Trainer on a machine without this package."""
    chosen: list[Any] = [TrimCallback(config())] if callbacks else []
    trainer = Trainer(with_lora(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=chosen)
    with pytest.raises((ValueError, RuntimeError), match=r"model's 6 layers.*trim_like" if callbacks else "size mismatch"):
        trainer.train(resume_from_checkpoint=str(run[0] / "checkpoint-8"))


def test_a_folder_saved_at_the_end_holds_the_map_too(run: Any, tmp_path: Path) -> None:
    model = with_lora()
    trainer = trim_trainer(tmp_path, model)
    trainer.train(resume_from_checkpoint=str(run[0] / "checkpoint-12"))  # nothing is dropped in this run
    trainer.save_model(str(tmp_path / "final"))
    base = tiny_model()
    assert trim_like(base, tmp_path / "final").num_layers == 4
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "final")), logits(model))


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_replication": [(0, 3), (2, 6)]}, "layer_replication in the LoRA config.*leave it out"),
        ({"layers_to_transform": [2, 3]}, r"adapter 'default' to stay on a layer, got .*\[2, 3\]"),
    ],
)
def test_a_lora_that_cannot_follow_is_refused(changes: dict[str, Any], said: str) -> None:
    check_refused(with_lora(**changes), said)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}, r"like LoRA, got \['PREFIX_TUNING'\].*Use LoRA"),
        ("PromptTuningConfig", {"num_virtual_tokens": 4}, r"like LoRA, got \['PROMPT_TUNING'\]"),
        ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}, "made layer by layer, like LoRA, got VERA"),
    ],
)
def test_other_kinds_are_refused(kind: str, settings: dict[str, Any], said: str) -> None:
    check_refused(peft.get_peft_model(tiny_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **settings)), said)


def check_refused(model: Any, said: str, unit: str = "block") -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = json.dumps([str(c) for c in model.peft_config.values()])
    with pytest.raises(ValueError, match=said):
        drop_layers(model, [2, 3] if unit == "block" else [2, 5], unit)
    assert not hasattr(model.config, "trim")
    assert json.dumps([str(c) for c in model.peft_config.values()]) == configs
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_the_best_adapter_is_loaded_onto_the_layers_that_it_belongs_to(tmp_path: Path) -> None:
    scores = iter([0.9, 0.5, 0.4, 0.7, 0.6, 0.1])  # after steps 2, 4, …: layers go after 3 and 6
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = TrimTrainer(
        with_lora(),
        arguments(tmp_path, **settings, **best),
        train_dataset=tiny_texts(),
        eval_dataset=tiny_texts(8, seed=9),
        compute_metrics=lambda _: {"score": next(scores)},
        trim=config(),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    now = {name.replace(".default", ""): value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    assert now and all(torch.equal(value, saved[name]) for name, value in now.items())


def test_going_back_to_a_deeper_model_cannot_be_promised(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = TrimTrainer(
        with_lora(),
        arguments(tmp_path, metric_for_best_model="loss", greater_is_better=False, **settings),
        train_dataset=tiny_texts(),
        eval_dataset=tiny_texts(8, seed=9),
        trim=config(max_metric_drop=0.1),
    )
    with pytest.raises(ValueError, match=r"a model without adapters for max_metric_drop"):
        trainer.train()
    assert trainer.model.config.num_hidden_layers == 6


def test_a_base_of_another_depth_is_refused(tmp_path: Path) -> None:
    model = with_lora()
    drop_layers(model, [1])
    model.save_pretrained(tmp_path)
    other = tiny_model(num_hidden_layers=8)
    with pytest.raises(ValueError, match="base model of 6 layers, got one of 8"):
        trim_like(other, tmp_path)
    assert other.config.num_hidden_layers == 8


def test_a_damaged_map_is_refused(run: Any, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    file = checkpoint / "trim_map.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain)[:40])
    with pytest.raises(ValueError, match=r"JSON in .*trim_map.json"):
        trim_like(tiny_model(), checkpoint)
    file.write_text(json.dumps({**plain, "kept_layers": [0, 1, 2, 3], "history": []}))
    with pytest.raises(ValueError, match=r"agree with itself.*\[0, 1, 2, 3\] by trim_map.json"):
        trim_like(tiny_model(), checkpoint)
