"""Sublayers: an attention or an MLP goes with its residual, and all that is left is as it was."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_surgery import BLOCKS, assert_same, logits, snapshot
from tiny import FAMILIES, tiny_model, tiny_texts, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from trimllm_hf import (
    LayerMap,
    TrimCallback,
    TrimConfig,
    TrimTrainer,
    drop_layers,
    score_layers,
    trim_like,
    write_remote_code,
)
from trimllm_hf.surgery.sublayers import PassThrough, find_output_specs

# What each architecture calls its halves, the norms that only they need, and the norms behind the sum.
LLAMA = {"attention": ["self_attn", "input_layernorm"], "mlp": ["mlp", "post_attention_layernorm"]}
GEMMA = {
    "attention": ["self_attn", "input_layernorm", "post_attention_layernorm"],
    "mlp": ["mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"],
}
SUBLAYER_KINDS: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "gpt2": {"attention": ["attn", "ln_1"], "mlp": ["mlp", "ln_2"]},
    "gpt_neox": {"attention": ["attention", "input_layernorm"], "mlp": ["mlp", "post_attention_layernorm"]},
    "opt": {"attention": ["self_attn", "self_attn_layer_norm"], "mlp": ["fc1", "fc2", "final_layer_norm"]},
    "phi": {"attention": ["self_attn"], "mlp": ["mlp"]},  # both read one norm, which stays
    "falcon": {"attention": ["self_attention"], "mlp": ["mlp"]},
    "bert": {"attention": ["attention"], "mlp": ["intermediate", "output"]},
}
LOST = [(1, "mlp"), (2, "attention"), (4, "attention"), (4, "mlp")]
POSITIONS = [3, 4, 8, 9]


@torch.no_grad()
def logits_without(model: PreTrainedModel, lost: list[tuple[int, str]]) -> torch.Tensor:
    """The reference, without hooks on what stays: all weights of a lost half are zero, so that it adds nothing.

    Where the norm stands behind the sum (BERT), the half hands on what it got.
    """
    family = model.config.model_type
    blocks: nn.ModuleList = model.get_submodule(BLOCKS[family])
    handles = []
    for layer, half in lost:
        if family == "bert":
            module = blocks[layer].get_submodule(SUBLAYER_KINDS[family][half][-1])
            which = 0 if half == "attention" else 1

            def hand_on(_, args, kwargs, output, which=which):
                return (args[which], *output[1:]) if isinstance(output, tuple) else args[which]

            handles.append(module.register_forward_hook(hand_on, with_kwargs=True))
            continue
        for name in SUBLAYER_KINDS[family][half]:
            for parameter in blocks[layer].get_submodule(name).parameters():
                parameter.zero_()
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_leaves_what_the_rest_computes(family: str) -> None:
    expected = logits_without(tiny_model(family), LOST)
    model = tiny_model(family)
    before = logits(model)
    blocks = model.get_submodule(BLOCKS[family])
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in blocks[1].named_modules()}
    total = sum(p.numel() for p in model.parameters())
    layer_map = drop_layers(model, POSITIONS, unit="sublayer")
    assert layer_map.kept_layers == (0, 1, 2, 3, 5)
    assert (layer_map.kept_attention, layer_map.kept_mlp) == ((0, 1, 3, 5), (0, 2, 3, 5))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-2)
    gone = sizes[""] + sum(sizes[name] for half in ("attention", "mlp") for name in SUBLAYER_KINDS[family][half])
    assert sum(p.numel() for p in model.parameters()) == total - gone  # norms that nobody reads any more go as well


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_cached_generation_equals_uncached(family: str) -> None:
    model = tiny_model(family)
    drop_layers(model, POSITIONS, unit="sublayer")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    cache = model(tokens(), use_cache=True).past_key_values
    assert len(cache.layers) == 5
    empty = [i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is None or layer.keys.numel() == 0]
    assert empty == [2]  # the block without attention holds nothing


def test_order_of_sublayers_and_composition() -> None:
    model = tiny_model()
    assert drop_layers(model, [3], unit="sublayer").sublayers[:4] == (
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
        (2, "attention"),
    )
    layer_map = drop_layers(model, [2], unit="sublayer")  # the attention of layer 1: nothing of it is left
    assert layer_map.kept_layers == (0, 2, 3, 4, 5) and layer_map.has_all_sublayers and len(model.model.layers) == 5
    assert type(model) is LlamaForCausalLM and type(model.config).__name__ == "LlamaConfig"  # stock again
    layer_map = drop_layers(model, [9], unit="sublayer")
    assert str(layer_map) == "[0, 2, 3, 4, 5], without the mlp of 5"
    layer_map = drop_layers(model, [1])  # a whole block
    assert layer_map.kept_layers == (0, 3, 4, 5) and layer_map.kept_mlp == (0, 3, 4)
    records = LayerMap.from_config(model.config).history
    assert [(record.dropped, record.sublayers) for record in records] == [
        ((1,), ("mlp",)),
        ((1,), ("attention",)),
        ((5,), ("mlp",)),
        ((2,), None),
    ]
    once = tiny_model()
    drop_layers(once, [1, 2])
    drop_layers(once, [7], unit="sublayer")
    torch.testing.assert_close(logits(model), logits(once), rtol=0, atol=0)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_what_left_is_freed() -> None:
    model = tiny_model()
    layer = model.model.layers[2]
    refs = [weakref.ref(p) for module in (layer.self_attn, layer.input_layernorm) for p in module.parameters()]
    del layer
    drop_layers(model, [4], unit="sublayer")
    assert len(refs) == 5 and all(ref() is None for ref in refs)
    assert not list(model.model.layers[2].self_attn.parameters())
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing idles: DDP would refuse


@pytest.mark.parametrize(
    ("family", "positions", "said"),
    [
        ("llama", [0], r"attention of the base's layers \[0\] to stay"),
        ("qwen2", [6], r"attention of the base's layers \[3\] to stay"),  # the first sliding one
        ("llama", [12], r"layers from 0 to 11 .*got \[12\]"),
        ("llama", [2, 2], "each layer once"),
    ],
)
def test_refusals_change_nothing(family: str, positions: list[int], said: str) -> None:
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        drop_layers(model, positions, unit="sublayer")
    assert_same(before, snapshot(model))
    assert not any(isinstance(module, PassThrough) for module in model.modules())


class Block(nn.Module):
    """Blocks of which one half cannot go, each in its own way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.self_attn, self.mlp, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.kind == "no residual":
            return self.mlp(self.self_attn(hidden_states))
        if self.kind == "scaled residual":
            hidden_states = 0.5 * hidden_states + self.self_attn(hidden_states)
            return hidden_states + self.mlp(hidden_states)
        if self.kind == "product":
            attention, mlp = self.self_attn(hidden_states), self.mlp(hidden_states)
            return hidden_states + attention + mlp + attention * mlp
        if self.kind == "norm of the sum":
            return hidden_states + self.norm(self.self_attn(hidden_states) + self.mlp(hidden_states))
        hidden_states = hidden_states + self.self_attn(self.norm(hidden_states))
        return hidden_states + self.mlp(hidden_states)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no residual", "changes the hidden states"),
        ("scaled residual", "changes the hidden states"),
        ("product", "neither one after the other nor the sum"),
        ("norm of the sum", "around the sum of both"),
    ],
)
def test_a_block_that_is_no_sum_of_its_halves_is_refused(kind: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_output_specs(Block(kind), 8)


def test_the_same_block_with_plain_residuals_is_not() -> None:
    halves = find_output_specs(Block("plain"), 8)
    assert set(halves.attention) == {"self_attn", "norm"} and set(halves.mlp) == {"mlp"}


def test_scores_are_losses_without_each_sublayer() -> None:
    model = tiny_model()
    batches = [{"input_ids": tokens(seed=seed), "labels": tokens(seed=seed)} for seed in (3, 4)]
    drop_layers(model, [5], unit="sublayer")
    scores = score_layers(model, batches, unit="sublayer")
    layer_map = LayerMap.from_config(model.config)
    assert scores.shape == (11,) == (len(layer_map.sublayers),)
    assert torch.equal(scores, score_layers(model, batches, unit="sublayer"))  # everything is put back
    for position, (layer, half) in enumerate(layer_map.sublayers):
        expected = logits_without_loss(layer, half, batches)
        assert scores[position].item() == pytest.approx(expected, abs=1e-5), (layer, half)
    assert score_layers(model, [], "last", "sublayer").tolist() == list(range(11, 0, -1))
    assert score_layers(model, [], "random", "sublayer").shape == (11,)


@torch.no_grad()
def logits_without_loss(layer: int, half: str, batches: list[dict[str, torch.Tensor]]) -> float:
    model = tiny_model()
    for name in [name for lost in ((2, "mlp"), (layer, half)) for name in [f"{lost[0]}.{n}" for n in LLAMA[lost[1]]]]:
        for parameter in model.model.layers.get_submodule(name).parameters():
            parameter.zero_()
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


# --- stored and loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trimmed Llama on disk."""
    path = tmp_path_factory.mktemp("trimmed")
    model = tiny_model()
    drop_layers(model, POSITIONS, unit="sublayer")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_classes_load_it(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    drop_layers(model, POSITIONS, unit="sublayer")
    model.save_pretrained(tmp_path)
    auto: Any = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == model.config.model_type and LayerMap.from_config(config).missing_sublayers == (
        (1, "mlp"),
        (2, "attention"),
    )
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again.eval()), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    body = AutoModel.from_pretrained(tmp_path)
    assert sum(isinstance(module, PassThrough) for module in body.modules()) > 0


STOCK = """
import json, sys
sys.modules["trimllm_hf"] = None  # an import of the package fails
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
folder, names = sys.argv[1], sys.argv[2].split(",")
ways = {
    "config": lambda: AutoConfig.from_pretrained(folder),
    "auto": lambda: AutoModelForCausalLM.from_pretrained(folder),
    "pipeline": lambda: pipeline("text-generation", folder),
}
for name in names:
    ways[name] = lambda name=name: getattr(transformers, name).from_pretrained(folder)
for name, way in ways.items():
    try:
        way()
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
    else:
        print(json.dumps([name, "loaded", ""]))
"""


def test_stock_transformers_fails_loudly(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), "LlamaForCausalLM,LlamaModel,LlamaConfig,MistralForCausalLM"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = {name: (kind, text) for name, kind, text in map(json.loads, done.stdout.splitlines())}
    assert len(said) == 7
    for name in ("config", "auto", "pipeline"):
        assert "model type `trimllm`" in said[name][1], said[name]
    for name in ("LlamaForCausalLM", "LlamaModel", "LlamaConfig", "MistralForCausalLM"):
        assert "import trimllm_hf" in said[name][1], said[name]


@pytest.mark.parametrize("first", ["trimllm_hf", "transformers"])
def test_the_import_alone_registers(first: str, folder: Path) -> None:
    second = "transformers" if first == "trimllm_hf" else "trimllm_hf"
    code = f"""
import {first}, {second}, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(type(model).__name__, len(model.model.layers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["LlamaForCausalLM", "5"], done.stderr


def test_the_whole_library_treats_it_as_before(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM) and model._get_name() == "LlamaForCausalLM"
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    reloaded = type(model).from_pretrained(folder)  # the class itself, as a Trainer does
    assert torch.equal(logits(reloaded.eval()), logits(model.eval()))
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32).eval()), logits(model))
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_weights_that_are_not_the_maps_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny_model()
    drop_layers(other, [3, 5, 8, 9], unit="sublayer")  # the MLP of 2, and not its attention
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"exactly the sublayers that config.trim keeps, got .*model.layers.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


REMOTE = """
import json, sys, torch
sys.modules["trimllm_hf"] = None  # an import of the package fails
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
for path in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    seen = torch.load(folder + "/seen.pt")
    with torch.no_grad():
        assert torch.equal(model(seen["tokens"]).logits, seen["logits"])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(seen["tokens"], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    if path == folder:
        model.save_pretrained(again)
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without trust")
print("same")
"""


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "gpt2"))]
)  # a mixture's weights are converted on the way
def test_code_beside_the_weights_loads_it_without_the_package(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    drop_layers(model, POSITIONS, unit="sublayer")
    model.save_pretrained(tmp_path / "one")
    assert write_remote_code(tmp_path / "one").name == "modeling_trimllm.py"
    torch.save({"tokens": tokens(), "logits": logits(model)}, tmp_path / "one" / "seen.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "one"), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.stdout.endswith("same\n"), done.stderr
    assert '"model_type": "trimllm"' in (tmp_path / "two" / "config.json").read_text()
    for path in ("one", "two"):  # and with it, as before
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / path).eval()), logits(model))


def test_code_is_written_only_where_it_is_needed(tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [2])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loads as it is"):
        write_remote_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))


# --- trained


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


TRIM = {
    "target_layers": 9,
    "drop_every": "2",
    "importance": "sensitivity",
    "calibration_size": 8,
    "unit": "sublayer",
    "repair": "none",
}


def test_a_trainer_drops_sublayers_and_keeps_the_others_state(tmp_path: Path) -> None:
    """Against torch alone: the full model with frozen zeros in place of what left, the optimizer's state untouched."""
    model = tiny_model()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(TrimConfig(**TRIM))])
    trainer.train()
    layer_map = LayerMap.from_config(model.config)
    assert len(layer_map.sublayers) == 9 and [record.step for record in layer_map.history] == [2, 4, 6]
    assert all(record.sublayers is not None for record in layer_map.history)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {id(p) for p in trainer.optimizer.state} == held
    logged = [entry["trim/num_layers"] for entry in trainer.state.log_history if "trim/num_layers" in entry]
    assert logged == [11, 10, 9]

    lost = [(record.step, record.dropped[0], record.sublayers[0]) for record in layer_map.history]
    full = tiny_model()
    frozen: list[torch.nn.Parameter] = []

    class Zero(TrainerCallback):
        """Zeroes the same halves at the same steps, and keeps them at zero."""

        def on_step_end(self, args, state, control, **kwargs):
            for step, layer, half in lost:
                if step == state.global_step:
                    for name in LLAMA[half]:
                        frozen.extend(full.model.layers[layer].get_submodule(name).parameters())
            with torch.no_grad():
                for parameter in frozen:
                    parameter.zero_()

    reference = Trainer(full, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[Zero()])
    reference.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (trainer, reference)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_resume_and_best_model(tmp_path: Path) -> None:
    trim = TrimConfig(**TRIM)
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = TrimTrainer(
        tiny_model(), arguments(tmp_path, **saving), train_dataset=tiny_texts(), eval_dataset=tiny_texts(8), trim=trim
    )
    run.train()
    end = LayerMap.from_config(run.model.config)
    again = TrimTrainer(
        tiny_model(), arguments(tmp_path, **saving), train_dataset=tiny_texts(), eval_dataset=tiny_texts(8), trim=trim
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert LayerMap.from_config(again.model.config).keeps_the_same(end)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=1e-6)
    model = tiny_model()
    assert (
        trim_like(model, tmp_path / "checkpoint-4").sublayers
        == LayerMap.from_checkpoint(tmp_path / "checkpoint-4").sublayers
    )
    wrong = Trainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(trim)])
    with pytest.raises(ValueError, match="Expected a checkpoint of the"):
        wrong.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_best_model_has_the_halves_that_were_reached(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = TrimTrainer(
        tiny_model(),
        arguments(tmp_path, **saving, load_best_model_at_end=True, learning_rate=5e-2),  # it gets worse
        train_dataset=tiny_texts(),
        eval_dataset=tiny_texts(8, seed=9),
        trim=TrimConfig(**TRIM),
    )
    run.train()
    best = LayerMap.from_checkpoint(run.state.best_model_checkpoint)
    assert best is not None and LayerMap.from_config(run.model.config).keeps_the_same(best)
    assert best.keeps_the_same(run.trim_callback().layer_map) and best.num_units("sublayer") == TRIM["target_layers"]
    loaded = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert torch.equal(logits(run.model.eval()), logits(loaded.eval()))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("positions", [[3], [4], [3, 4, 8, 9]], ids=["mlp", "attention", "more"])
def test_an_adapter_goes_onto_a_base_with_the_same_halves_only(
    positions: list[int], targets: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), settings).eval()
    drop_layers(model, positions, unit="sublayer")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    base = tiny_model()
    trim_like(base, tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path).eval()), logits(model))


def test_peft_pipelines_and_label_smoothing(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))  # it knows Llama's modules by name
    trainer = Trainer(adapted, arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1), train_dataset=tiny_texts())
    trainer.train()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(again.eval()), logits(merged.eval()), atol=1e-6)

    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(tmp_path / "merged")
    generate = pipeline("text-generation", str(tmp_path / "merged"))
    (written,) = generate("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith("w5 w6 w7w")

    def smoothed(model: Any) -> float:
        run = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=tiny_texts())
        return run.compute_loss(model, {"input_ids": tokens(), "labels": tokens()}).item()

    zeroed = tiny_model()
    logits_without(zeroed, LOST)  # leaves the weights at zero
    assert smoothed(AutoModelForCausalLM.from_pretrained(folder).eval()) == pytest.approx(smoothed(zeroed), abs=1e-5)


def test_settings_count_sublayers(tmp_path: Path) -> None:
    config = TrimConfig(target_ratio=0.5, unit="sublayer")
    assert config.resolve_target(12, 12) == 6
    with pytest.raises(ValueError, match="at least the 4 protected layers"):
        TrimConfig(target_layers=3, unit="sublayer").resolve_target(12, 12)
    with pytest.raises(ValueError, match="Expected unit='block' or 'sublayer', got 'half'"):
        TrimConfig(target_layers=3, unit="half")
