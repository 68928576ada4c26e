"""Trains a tiny model while it is trimmed, with stock Trainer, in as many processes as launched; writes what it saw.

python train.py FOLDER [--resume CHECKPOINT] [--save STEPS] [--bare N]: with --resume by TrimTrainer's own resume.
"""

import argparse
import json
import os
import sys
import weakref
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Watch(TrainerCallback):
    """Dropped parameters that still live, and the survivors' moments on both sides of a drop."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self.unchanged: list[bool] = []
        self.before: dict[int, tuple[torch.Tensor, ...]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.refs = [weakref.ref(parameter) for parameter in model.parameters()]

    def on_optimizer_step(self, args, state, control, optimizer=None, model=None, **kwargs):
        self.before = {
            id(parameter): (parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values()))
            for parameter in model.parameters()
        }

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = list(model.parameters())
        now = {id(parameter) for parameter in parameters}
        if state.global_step in (3, 6):  # comes after TrimCallback
            assert len(parameters) < len(self.before)
            after = {id(p): (p.detach(), *optimizer.state[p].values()) for p in parameters}
            self.unchanged.append(
                all(torch.equal(a, b) for key in after for a, b in zip(after[key], self.before[key], strict=True))
            )
        self.before = {}
        if state.global_step in (4, 7):
            self.alive.append(sum(1 for ref in self.refs if ref() is not None and id(ref()) not in now))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--resume")
    parser.add_argument("--save", type=int)
    parser.add_argument("--calibration", type=int, default=9)  # not a multiple of two: shares differ
    options = parser.parse_args()
    args = TrainingArguments(
        output_dir=options.folder,
        max_steps=12,
        per_device_train_batch_size=4 // WORLD,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="steps" if options.save else "no",
        save_steps=options.save or 500,
        use_cpu=True,
        ddp_backend="gloo" if WORLD > 1 else None,
        report_to=[],
        disable_tqdm=True,
    )
    trim = TrimConfig(target_layers=4, drop_every="3", calibration_size=options.calibration)
    model = tiny_model(tie_word_embeddings=True)
    watch = Watch()
    if options.save or options.resume:
        trainer: Trainer = TrimTrainer(model, args, train_dataset=tiny_texts(), trim=trim)
    else:
        trainer = Trainer(model, args, train_dataset=tiny_texts(), callbacks=[TrimCallback(trim), watch])
    wrapped_before = []

    class Identity(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            wrapped_before.append(trainer.model_wrapped)

    trainer.add_callback(Identity)
    trainer.train(resume_from_checkpoint=options.resume)
    assert trainer.model_wrapped is wrapped_before[0] and trainer.model is model
    result = {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "kept_layers": model.config.trim["kept_layers"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
        "alive": watch.alive,
        "unchanged": watch.unchanged,
    }
    rank = trainer.args.process_index
    torch.save({**result, "weights": dict(model.state_dict())}, Path(options.folder) / f"rank{rank}.pt")
    print(json.dumps(result))


main()
