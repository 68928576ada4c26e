"""The check on weights of another depth: for each copy of a model by its own blocks, and gone when training is over."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts, tokens
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from trimllm_hf import TrimCallback, TrimConfig, drop_layers
from trimllm_hf.loading.depth_check import refuse_other_depths


def watched() -> PreTrainedModel:
    model = tiny_model()
    refuse_other_depths(model)
    return model


def hooks(model: nn.Module) -> int:
    return len(model._load_state_dict_pre_hooks)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: nn.Module) -> Any:
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved], ids=lambda f: f.__name__)
def test_a_copy_looks_at_its_own_blocks(copied: Any) -> None:
    model = watched()
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = copied(model)
    drop_layers(model, [1, 4])
    after = copied(model)
    before.load_state_dict(full)  # taken before the drop: its own weights, at its own depth
    after.load_state_dict(model.state_dict())
    for trimmed in (model, after):
        with pytest.raises(ValueError, match="Expected a checkpoint of the model's 4 layers"):
            trimmed.load_state_dict(full, strict=False)
    with pytest.raises(ValueError, match="Expected a checkpoint of the model's 6 layers"):
        before.load_state_dict(model.state_dict(), strict=False)
    drop_layers(before, [0])  # trimmed elsewhere, after the copy
    before.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="model's 5 layers"):
        before.load_state_dict(full, strict=False)


def test_it_can_be_taken_off() -> None:
    model = tiny_model()
    handle = refuse_other_depths(model)
    handle.remove()
    assert hooks(model) == 0
    full = tiny_model().state_dict()
    drop_layers(model, [1])
    model.load_state_dict(full, strict=False)


def trainer(model: PreTrainedModel, folder: Path, callback: TrimCallback, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"save_strategy": "no", **more},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=tiny_texts(16), eval_dataset=tiny_texts(4), callbacks=[callback])


def test_it_is_gone_after_training_and_there_again_in_the_next(tmp_path: Path) -> None:
    model = tiny_model()
    callback = TrimCallback(TrimConfig(target_layers=4, drop_every="once", importance="block_influence", calibration_size=2))
    run = trainer(model, tmp_path, callback)
    assert hooks(model) == 1
    run.train()
    assert hooks(model) == 0
    again = torch_saved(model)  # what a person without this package can read: it refers to nothing of it
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)
    assert b"trimllm_hf" not in pickle.dumps(model)
    other = tiny_model(seed=1)
    second = trainer(
        other,
        tmp_path,
        TrimCallback(TrimConfig(target_layers=4, drop_every="once", importance="block_influence", calibration_size=2)),
    )
    second.train()
    assert hooks(other) == 0
