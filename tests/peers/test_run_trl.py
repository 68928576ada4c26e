"""The script that runs TRL's tests, on tests of its style that are written here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run_trl

TOY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

def trained(folder):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        initializer_range=0.5,
    )
    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(8)]
    args = TrainingArguments(str(folder), max_steps=1, learning_rate=0.1, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return trainer, before

def test_parameters_change(tmp_path):
    trainer, before = trained(tmp_path)
    for name, parameter in before.items():
        assert not torch.equal(parameter, trainer.model.get_parameter(name)), name

def test_the_depth_stays(tmp_path):
    assert len(trained(tmp_path)[0].model.model.layers) == 4

def test_the_depth_stays_as_well(tmp_path):
    assert trained(tmp_path)[0].model.config.num_hidden_layers == 4

def test_fails_anyway(tmp_path):
    trained(tmp_path)
    raise OSError("not there")
"""


@pytest.mark.slow
def test_what_fails_with_the_callback_only_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    (tmp_path / "source" / "tests").mkdir(parents=True)
    (tmp_path / "source" / "tests" / "test_toy_trainer.py").write_text(TOY)
    assumed = "tests/test_toy_trainer.py::test_the_depth_stays_as_well"
    monkeypatch.setattr(run_trl, "assumptions", lambda peer: {assumed: "the depth stays"})
    monkeypatch.setattr(sys, "argv", ["run_trl.py", "--source", str(tmp_path / "source"), "--work", str(tmp_path / "work")])
    assert run_trl.main() == 1
    lines, only = run_trl.table(tmp_path / "work")
    assert lines[:2] == [
        "4 trained a model that lost layers, 1 of them passed",
        "3 failed, 2 of them only with the callback:",
    ]
    assert only == ["tests/test_toy_trainer.py::test_the_depth_stays"]
    assert f"  {assumed}: an assumption" in capsys.readouterr().out.splitlines()
