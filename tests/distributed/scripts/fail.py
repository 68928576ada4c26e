"""A score, or the guard, fails on one process of two: what each of them raises, and the model afterwards.

python fail.py FOLDER {score,guard}
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts

import trimllm_hf.training.selection
from trimllm_hf import TrimCallback, TrimConfig, register_importance

folder, where = sys.argv[1:]
args = TrainingArguments(
    folder, max_steps=6, use_cpu=True, ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="no"
)
rank = args.process_index


calls = []


def fails_on_one(model, batches, unit):
    calls.append(len(batches))
    if rank == 1 and len(calls) > 1:  # the first call is the rehearsal when training begins
        raise KeyError("the second process has no such column")
    return torch.arange(6.0), 1.0


register_importance("fails_on_one", fails_on_one)
if where == "guard" and rank == 1:

    def refuse(*args, **kwargs):
        raise ValueError("the second process refuses")

    trimllm_hf.training.selection.plan_drop = refuse  # the rehearsal when training begins has its own
importance = "fails_on_one" if where == "score" else "last"
how = {"calibration_size": 8, "warm_up_importance": "none", "repair": "none"}
trim = TrimConfig(target_layers=4, drop_every="2", importance=importance, **how)
model = tiny_model()
trainer = Trainer(model, args, train_dataset=tiny_texts(), callbacks=[TrimCallback(trim)])
try:
    trainer.train()
    raised = None
except Exception as error:
    raised = [type(error).__name__, str(error)]
result = {
    "raised": raised,
    "step": trainer.state.global_step,
    "layers": len(model.model.layers),
    "trim": hasattr(model.config, "trim"),
}
(Path(folder) / f"rank{rank}.json").write_text(json.dumps(result))
