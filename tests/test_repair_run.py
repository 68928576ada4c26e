"""A run that repairs: what it is fitted on, when it is kept, what stands in the log and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer
from trimllm_hf.publish.card import CARD, REPORT

logger = logging.get_logger("transformers.trimllm_hf")


def config(**changes: Any) -> TrimConfig:
    values: dict[str, Any] = {
        "target_layers": 4, "drop_every": "once", "rescore": False, "importance": "block_influence", "calibration_size": 16,
        "repair": "auto",
    }  # fmt: skip
    return TrimConfig(**{**values, **changes})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, **changes,
    )  # fmt: skip


class First(TrainerCallback):
    """The model's state when the first step begins."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.state:
            self.state = {name: value.clone() for name, value in model.state_dict().items()}


def trained(folder: Path, trim: TrimConfig, model: Any = None, trim_trainer: bool = True) -> tuple[Trainer, Any, Any]:
    first = First()
    model = model or tiny_model()
    texts = tiny_texts(60)
    if trim_trainer:
        trainer: Any = TrimTrainer(model, arguments(folder), train_dataset=texts, trim=trim)
    else:
        trainer = Trainer(model, arguments(folder), train_dataset=texts, callbacks=[TrimCallback(trim)])
    trainer.add_callback(first)
    trainer.train()
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, TrimCallback))
    return trainer, callback, first.state


@pytest.mark.parametrize("trim_trainer", [True, False])
def test_a_run_begins_repaired(tmp_path: Path, trim_trainer: bool) -> None:
    # enough tokens that it does lower the loss of a random model
    trainer, callback, state = trained(tmp_path, config(repair_tokens=1024), trim_trainer=trim_trainer)
    (repair,) = callback.record.repairs
    assert repair["applied"] and repair["step"] == 0 and repair["repaired_loss"] < repair["plain_loss"]
    _, plain, other = trained(tmp_path / "plain", config(repair="none"), trim_trainer=trim_trainer)
    assert plain.record.repairs == [] and plain.record.layer_map.kept_layers == callback.record.layer_map.kept_layers
    changed = [name for name, value in state.items() if not torch.equal(value, other[name])]
    assert changed and all(name.endswith("mlp.down_proj.weight") for name in changed)
    assert len(changed) == len(repair["repaired"])
    kept = callback.record.layer_map.kept_layers
    assert repair["weights"] == {"mlp.down_proj": [kept[int(name.split(".")[2])] for name in changed]}
    trainer.save_model(str(tmp_path / "saved"))
    if trim_trainer:
        report = json.loads((tmp_path / "saved" / REPORT).read_text())
        assert report["training"]["repairs"] == [{**repair, "repaired": list(repair["repaired"])}]
        of = ", ".join(map(str, repair["weights"]["mlp.down_proj"]))
        losses = f"{repair['plain_loss']:.4g} | {repair['repaired_loss']:.4g}"
        assert f"| 0 | `mlp.down_proj` of {of} | {losses} |" in (tmp_path / "saved" / CARD).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tiny_texts(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_repair_that_harms_leaves_the_plain_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = iter([1.0, 2.0])  # without, and with it
    monkeypatch.setattr("trimllm_hf.training.repair.loss_without", lambda *args, **kwargs: next(losses))
    logger.addHandler(caplog.handler)
    try:
        _, callback, state = trained(tmp_path, config())
    finally:
        logger.removeHandler(caplog.handler)
    assert [repair["applied"] for repair in callback.record.repairs] == [False]
    assert "The plain drop stays: held-out loss 2, without the repair 1." in caplog.text
    _, _, plain = trained(tmp_path / "plain", config(repair="none"))
    assert all(torch.equal(value, plain[name]) for name, value in state.items())


def test_where_there_is_no_place_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger.addHandler(caplog.handler)
    try:
        trainer, callback, _ = trained(tmp_path, config(), model=tiny_model("gemma2"))
    finally:
        logger.removeHandler(caplog.handler)
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / CARD).read_text()
    assert "none, the plain drop stayed (" in card and "adds straight to the hidden states) | not measured" in card
    assert "No repair, the plain drop stays" in caplog.text and "adds straight to the hidden states" in caplog.text
    assert [repair["applied"] for repair in callback.record.repairs] == [False]
    model = tiny_model("gemma2")
    with pytest.raises(ValueError, match="Expected layers whose loss can be repaired, got none"):
        trained(tmp_path, config(repair="required"), model=model)
    assert model.config.num_hidden_layers == 6 and not getattr(model.config, "trim", None)


def test_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))

    logger.addHandler(caplog.handler)
    try:
        _, callback, _ = trained(tmp_path, config(), model=adapted())
    finally:
        logger.removeHandler(caplog.handler)
    assert "No repair, the plain drop stays (the model has adapters" in caplog.text
    assert [repair["applied"] for repair in callback.record.repairs] == [False]
    with pytest.raises(ValueError, match="Expected a model without adapters to repair"):
        trained(tmp_path, config(repair="required"), model=adapted())


def test_too_few_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="it takes 128 calibration tokens at least, there are 64"):
        trained(tmp_path, config(repair="required", repair_tokens=1))


@pytest.mark.parametrize("rows", [1, 20])
def test_fewer_rows_than_calibration_examples_do_not_end_a_run(rows: int, tmp_path: Path) -> None:
    trim = config(importance="last", calibration_size=64)
    trainer = Trainer(
        tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(rows), callbacks=[TrimCallback(trim)]
    )  # fmt: skip
    trainer.train()
    assert trainer.model.config.num_hidden_layers == 4


def test_the_score_needs_no_examples_but_the_repair_does(tmp_path: Path) -> None:
    trainer, callback, _ = trained(tmp_path, config(importance="last"))
    assert callback.record.repairs[0]["applied"] in (True, False) and len(trainer.calibration_dataset) == 16
    assert callback.record.repairs[0]["plain_loss"] > 0


def test_a_checkpoint_tells_of_it(tmp_path: Path) -> None:
    trainer = TrimTrainer(
        tiny_model(), arguments(tmp_path), train_dataset=tiny_texts(60), trim=config(), callbacks=[]
    )  # fmt: skip
    trainer.args.save_strategy = "steps"
    trainer.args.save_steps = 1
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    (repair,) = state["stateful_callbacks"]["TrimCallback"]["attributes"]["saved_run"]["repairs"]
    assert repair["applied"] and repair["repaired"]


@pytest.mark.parametrize("wrong", [{"repair": "yes"}, {"repair_tokens": 0}])
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))}"):
        config(**wrong)


def test_sublayers(tmp_path: Path) -> None:
    _, callback, _ = trained(tmp_path, config(unit="sublayer", target_layers=9))
    (repair,) = callback.record.repairs
    assert len(repair["repaired"]) >= 1 and repair["repaired_loss"] > 0
