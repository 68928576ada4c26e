"""What may go next, and whether a plan can reach its target: patterns, the last attention of a hybrid, T5's first block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    TrainingArguments,
)

from trimllm_hf import LayerMap, TrimConfig, TrimTrainer
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.drop import plan_drop
from trimllm_hf.surgery.feasibility import least_important
from trimllm_hf.training.dry_run import dry_run


def hybrid() -> PreTrainedModel:
    """Eight blocks, of which only block 4 attends."""
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4,
        mamba_dt_rank=4,
    )  # fmt: skip
    return JambaForCausalLM(config)


def periodic() -> PreTrainedModel:
    """Six decoder blocks, of which every second has experts: the config has only the step, no list."""
    torch.manual_seed(0)
    config = NllbMoeConfig(
        vocab_size=97, d_model=16, encoder_layers=2, decoder_layers=6, encoder_attention_heads=2, expert_capacity=64,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_experts=2, decoder_sparse_step=2,
        router_dtype="float32",
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config)


def trainer(model: PreTrainedModel, folder: Path, data: Any, **settings: Any) -> TrimTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trim = TrimConfig(importance="first", drop_every="1", repair="none", calibration_size=4, **settings)
    return TrimTrainer(model, arguments, train_dataset=data, trim=trim)


def test_the_least_important_that_may_go() -> None:
    model = hybrid()
    scores = dict(enumerate([5.0, 4.0, 3.0, 2.0, 0.0, 1.0, 6.0, 7.0]))  # block 4, the attention, has the lowest
    assert least_important(lambda layers: plan_drop(model, layers), scores, most=1).positions == {5}
    assert least_important(lambda layers: plan_drop(model, layers), {1: 1.0, 2: 1.0}, most=1).positions == {2}
    with pytest.raises(ValueError, match=r"attention layers \[4\] to stay"):
        least_important(lambda layers: plan_drop(model, layers), {4: 0.0}, most=3)


def test_a_period_goes_at_once() -> None:
    model = periodic()
    plan = lambda layers: plan_drop(model, layers, part="decoder")  # noqa: E731
    scores = {position: float(position) for position in range(1, 4)}
    with pytest.raises(ValueError, match=r"another value at .*is_sparse.*Nothing was changed"):
        least_important(plan, scores, most=1)
    assert least_important(plan, scores, most=2).positions == {1, 2}
    assert dry_run(model, TrimConfig(target_layers=4, part="decoder"), 2) == {6: 2}
    assert len(find_blocks(model)) == 6 and not hasattr(model.config, "trim")


def test_most_models_lose_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.get_objects", None)  # a copy shares nothing: no search of all that is alive for each drop
    assert dry_run(tiny_model(), TrimConfig(target_layers=2), 4) == {6: 1, 5: 1, 4: 1, 3: 1}


def test_training_drops_whole_periods(tmp_path: Path) -> None:
    data = [{**text, "decoder_input_ids": text["input_ids"]} for text in tiny_texts(40, 8)]
    trim = trainer(periodic(), tmp_path, data, target_layers=2)
    trim.train()
    records = LayerMap.from_config(trim.model.config).history
    assert [(record.step, record.dropped) for record in records] == [(1, (1, 2)), (3, (3, 4))]
    assert [len(record.scores or ()) for record in records] == [2, 2]


def test_a_target_without_a_way_is_refused_at_the_start(tmp_path: Path) -> None:
    model = hybrid()
    with pytest.raises(ValueError, match=r"got 2 layers. It can be trimmed to 3; then: .*attention layers \[1\] to stay"):
        trainer(model, tmp_path, tiny_texts(40), target_layers=2).train()
    assert len(find_blocks(model)) == 8 and not hasattr(model.config, "trim")


def test_training_keeps_the_last_attention(tmp_path: Path) -> None:
    trim = trainer(hybrid(), tmp_path, tiny_texts(40), target_layers=4, protect_last=0)
    trim.train()
    assert LayerMap.from_config(trim.model.config).kept_layers == (0, 4, 6, 7)
