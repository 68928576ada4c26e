"""Adapters on a quantized base: it loses layers as any other, and scoring leaves its weights as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from trimllm_hf import TrimCallback, trim_like

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


def load(base: Path, kind: str) -> Any:
    quantization = BitsAndBytesConfig(**KINDS[kind])
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantized_base(kind: str, base: Path, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(load(base, kind)), lora)
    settings = arguments(tmp_path, max_steps=8)
    trainer = Trainer(model, settings, train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    trainer.train()
    assert model.config.num_hidden_layers == 4 and len(losses(trainer)) == 8
    trainer.save_model(str(tmp_path / "adapter"))
    again = load(base, kind)
    trim_like(again, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    with torch.no_grad():  # in training mode: see bitsandbytes' packing for the CPU
        assert torch.equal(again.train()(tokens()).logits, model.train()(tokens()).logits)
    fresh = dict(load(base, kind).named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if name.endswith("base_layer.weight"):
            parts = name.replace(".base_layer", "").split(".")
            parts[2] = str(model.config.trim["kept_layers"][int(parts[2])])
            assert torch.equal(parameter, fresh[".".join(parts)])  # the bytes themselves
