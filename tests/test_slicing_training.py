"""A sliced model is an ordinary module tree: gradient checkpointing, Trainer and adapters treat it like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sliced import calibration, model_to_slice
from tiny import tiny_texts, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from trimllm_hf import TrimConfig, TrimTrainer, slice_model

WRITERS = {"llama": "down_proj", "opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(tokens()).logits
    return found


def sliced(name: str = "llama", **changes: Any) -> PreTrainedModel:
    model = model_to_slice(name, **changes)
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    return model


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    changes = {"dropout": 0.0, "attention_dropout": 0.0} if name == "opt" else {}
    plain, saving = sliced(name, **changes), sliced(name, **changes)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        for _ in range(2):  # nothing is left over from the first pass
            model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    mine = dict(saving.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(mine[key].grad, parameter.grad)


@pytest.mark.parametrize("name", WRITERS)
def test_lora_on_what_is_held_back(name: str, tmp_path: Path) -> None:
    """An adapter takes the place of the very matrix whose result goes past the shortcut."""
    model = sliced(name)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[WRITERS[name]], init_lora_weights=False)).eval()
    want = logits(adapted)
    assert (want - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval())).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), want)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()))


def test_a_trainer_trains_and_saves_it(tmp_path: Path) -> None:
    model = sliced()
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=tiny_texts(size=24)).train()
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "weight" in key)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_trainer_trains_an_adapter_on_it(tmp_path: Path) -> None:
    model = sliced()
    model.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "shortcut"]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(adapted, arguments, train_dataset=tiny_texts(size=24)).train()
    trained = dict(adapted.named_parameters())
    added = [value for key, value in trained.items() if "lora_B" in key]
    assert len(added) == 3 * 6 and all(value.abs().max() > 0 for value in added)
    kept = {key.removeprefix("base_model.model.").replace(".base_layer", ""): value for key, value in trained.items()}
    assert all(torch.equal(kept[key], value) for key, value in before.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint-3").eval()
    torch.testing.assert_close(logits(again), logits(adapted.eval()))


def test_a_run_that_would_trim_it_is_refused_before_its_first_step(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    steps = []
    with pytest.raises(ValueError, match="not sliced, got one whose layers have bases and widths"):
        trainer = TrimTrainer(
            sliced(), arguments, trim=TrimConfig(target_layers=3, calibration_size=8), train_dataset=tiny_texts(size=64)
        )
        trainer.model.register_forward_hook(lambda *_: steps.append(1))
        trainer.train()
    assert not steps
