"""Trains until an evaluation fails, or a time is met, in as many processes as launched; writes what the run ended with.

python stop.py FOLDER {metric,latency}

The evaluation says a number by depth, and so does the clock: 5 layers pass, 4 fail; 4 layers are fast enough.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts

import trimllm_hf.training.budget
from trimllm_hf import TrimCallback, TrimConfig

folder, reason = Path(sys.argv[1]), sys.argv[2]
world = int(os.environ.get("WORLD_SIZE", "1"))
args = TrainingArguments(
    str(folder / "run"),
    max_steps=12,
    per_device_train_batch_size=4 // world,
    learning_rate=1e-4,  # Adam turns rounding into steps of this size where a gradient is almost zero
    save_strategy="no",
    logging_steps=1,
    use_cpu=True,
    ddp_backend="gloo" if world > 1 else None,
    report_to=[],
    disable_tqdm=True,
)
measured: list[int] = []


def by_depth(model, config, args, without) -> list[float]:
    depth = model.config.num_hidden_layers - len(without)
    measured.append(depth)
    return [2.0 * depth, 0.1]


trimllm_hf.training.budget._latency_and_memory = by_depth
model = tiny_model()
settings = {"drop_every": "2", "importance": "sensitivity", "repair": "none", "warm_up_importance": "none"}
if reason == "metric":
    trim = TrimConfig(3, max_metric_drop=0.05, stop_metric="score", **settings)
else:
    trim = TrimConfig(max_latency_ms=8.5, **settings)
scores = {6: 0.80, 5: 0.79, 4: 0.5, 3: 0.79}
trainer = Trainer(
    model,
    args,
    train_dataset=tiny_texts(),
    eval_dataset=tiny_texts(8, seed=9),
    compute_metrics=lambda _: {"score": scores[model.config.num_hidden_layers]},
    callbacks=[TrimCallback(trim, calibration_dataset=tiny_texts(9, seed=5))],
)
trainer.train()
result = {
    "type": trainer.accelerator.distributed_type.value,
    "depths": [(e["step"], e["trim/num_layers"]) for e in trainer.state.log_history if "trim/num_layers" in e],
    "kept": model.config.trim["kept_layers"],
    "blocks": len(model.model.layers),
    "measured": measured,
}
(folder / f"rank{args.process_index}.json").write_text(json.dumps(result))
torch.save(model.state_dict(), folder / f"rank{args.process_index}.pt")
trainer.accelerator.wait_for_everyone()
