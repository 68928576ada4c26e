"""Gemma 3n: tensors outside the blocks that hold a part for each block are cut with them, and not while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_texts, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig, PreTrainedModel, TrainingArguments

from trimllm_hf import TrimConfig, TrimTrainer, drop_layers, load_kept_layers, write_kept_layers
from trimllm_hf.surgery.per_layer_tensors import cut

KEPT = [0, 3, 4, 5, 6, 7]


def gemma3n() -> PreTrainedModel:
    """Eight blocks with an own input each, of which the last two take keys and values of earlier ones."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=64,
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 4, activation_sparsity_pattern=[0.0] * 8, laurel_rank=8,
        sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_parts_of_dropped_layers_are_cut_out(tmp_path: Path) -> None:
    model = gemma3n()
    before = model.model.per_layer_model_projection.weight
    of_base = before.detach().clone()
    model.save_pretrained(tmp_path / "base")
    drop_layers(model, [1, 2])
    assert model.model.per_layer_model_projection.weight is before  # an optimizer made before would still hold it
    assert torch.equal(before, torch.cat([of_base[8 * layer : 8 * layer + 8] for layer in KEPT]))
    model.save_pretrained(tmp_path / "trimmed")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "trimmed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_kept_layers(tmp_path / "base", KEPT)), logits(model))
    write_kept_layers(tmp_path / "base", KEPT, tmp_path / "written")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "written")), logits(model))


def test_a_trainer_refuses_before_anything_changes(tmp_path: Path) -> None:
    model = gemma3n()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True)
    trim = TrimConfig(target_layers=6, drop_every="1", repair="none", calibration_size=4)
    with pytest.raises(ValueError, match=r"embed_tokens_per_layer.*before training, by drop_layers"):
        TrimTrainer(model, arguments, train_dataset=tiny_texts(20), trim=trim).train()
    assert len(model.model.layers) == 8 and model.model.per_layer_model_projection.weight.shape == (64, 32)


def test_cut_keeps_the_parts_in_order() -> None:
    weight = nn.Parameter(torch.arange(24.0).reshape(2, 12))
    assert torch.equal(cut(weight.data, 1, 4, [0, 3]), weight[:, [0, 1, 2, 9, 10, 11]])
