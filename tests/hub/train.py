"""Trains and pushes by a TrimTrainer, in a process that talks to the local Hub: train.py OUTPUT_DIR REPO STRATEGY."""

from __future__ import annotations

import os
import sys

from tiny import tiny_model, tiny_texts
from transformers import TrainingArguments

from trimllm_hf import TrimCardData, TrimConfig, TrimTrainer

output_dir, repo_id, strategy = sys.argv[1:]
# The Trainer pickles its arguments with the token in them.
by_argument = {"hub_token": os.environ.pop("HF_TOKEN")} if strategy == "checkpoint" else {}
arguments = TrainingArguments(
    output_dir, max_steps=6, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=0,
    push_to_hub=True, hub_model_id=repo_id, hub_strategy=strategy, hub_always_push=True, **by_argument,
)  # fmt: skip
trainer = TrimTrainer(
    tiny_model(), arguments, train_dataset=tiny_texts(),
    trim=TrimConfig(target_layers=4, drop_every=2, calibration_size=8),
)  # fmt: skip
if strategy != "end":  # once is enough
    trainer.card_data = TrimCardData(latency={"not_measured": "a test"}, usage={"not_run": "a test"})
trainer.train()
print("first:", trainer.push_to_hub().oid)
print("second:", trainer.push_to_hub(blocking=False).result().oid)
