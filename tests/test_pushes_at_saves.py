"""A push that a Trainer makes at a save reads its folder in the background: the next save has to wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer


class Upload:
    """A push in the background that ends when it is waited for."""

    done = False

    def is_done(self) -> bool:
        return self.done

    def wait_until_done(self) -> None:
        self.done = True


class AtSave(TrainerCallback):
    """Does what `Trainer._push_from_checkpoint` does before it copies the checkpoint's files."""

    def __init__(self) -> None:
        self.seen: list[bool] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        upload = self.trainer.push_in_progress = Upload()
        self.trainer.callback_handler.on_push_begin(args, state, control)
        self.seen.append(upload.done)


@pytest.mark.parametrize("trimmed_by", ["callback", "trainer"])
def test_the_files_of_a_push_are_not_replaced_under_it(trimmed_by: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    at_save, trim = AtSave(), TrimConfig(target_layers=5, drop_every=1, calibration_size=4, importance="last")
    if trimmed_by == "callback":
        trainer = Trainer(tiny_model(), arguments, train_dataset=tiny_texts(), callbacks=[TrimCallback(trim), at_save])
    else:
        trainer = TrimTrainer(tiny_model(), arguments, train_dataset=tiny_texts(), trim=trim, callbacks=[at_save])
    at_save.trainer = trainer
    trainer.train()
    assert at_save.seen == [True, True]
