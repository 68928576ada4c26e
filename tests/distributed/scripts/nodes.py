"""Trains, and resumes from the first checkpoint, on two nodes that share no disk: each process has a folder of its own.

python nodes.py FOLDER {each,main}   each: save_on_each_node, and the main node's weights are copied to the other
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

folder, saves = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = "0"  # the only process of its node

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import trimllm_hf.training.nodes  # noqa: E402
from trimllm_hf import TrimConfig, TrimTrainer  # noqa: E402

said: list[str] = []
trimllm_hf.training.nodes.logger.warning = said.append
here = folder / f"disk{rank}"


def trainer() -> TrimTrainer:
    args = TrainingArguments(
        str(here), max_steps=6, per_device_train_batch_size=2, save_steps=2, save_on_each_node=saves == "each", use_cpu=True,
        ddp_backend="gloo", report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trim = TrimConfig(target_layers=4, drop_every="2", importance="last", repair="none", calibration_size=8)
    return TrimTrainer(tiny_model(), args, train_dataset=tiny_texts(60), trim=trim)


whole = trainer()
whole.train()
losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
whole.accelerator.wait_for_everyone()
for step in (4, 6):
    shutil.rmtree(here / f"checkpoint-{step}", ignore_errors=True)
if saves == "each" and rank == 1:
    for file in (folder / "disk0" / "checkpoint-2").glob("*"):
        if not (here / "checkpoint-2" / file.name).exists():
            shutil.copy(file, here / "checkpoint-2")
whole.accelerator.wait_for_everyone()
again, raised, equal = trainer(), None, False
try:
    again.train(resume_from_checkpoint=True)
    equal = all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
except ValueError as error:
    raised = str(error)
result = {
    "said": said, "raised": raised, "equal": equal, "losses": losses, "step": again.state.global_step,
    "again": [entry["loss"] for entry in again.state.log_history if "loss" in entry],
}  # fmt: skip
(folder / f"rank{rank}.json").write_text(json.dumps(result))
whole.accelerator.wait_for_everyone()
