"""Trains a sliced model with a stock Trainer under an engine, in as many processes as launched; writes what it saw.

python train_sliced.py MODEL FOLDER --engine {plain,fsdp2,zero2} [--resume] [--kill STEP]
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("folder")
parser.add_argument("--engine", default="plain")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--kill", type=int)
options = parser.parse_args()
if options.engine == "zero2":
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
if options.engine == "fsdp2":
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_texts  # noqa: E402

import trimllm_hf  # noqa: E402, F401

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


def engine_arguments() -> dict[str, Any]:
    """What TrainingArguments get for the engine; `use_cpu` would silently mean DDP."""
    if options.engine == "plain":
        return {"use_cpu": True, "ddp_backend": "gloo" if WORLD > 1 else None}
    configured = {"accelerator_config": {"use_configured_state": True}}
    if options.engine == "fsdp2":
        state = PartialState(cpu=True)
        state.device = torch.device("cpu")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        fsdp = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
        }
        return {"fsdp": True, "fsdp_config": fsdp, **configured}
    PartialState(backend="gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"deepspeed": config, **configured}


class Watch(TrainerCallback):
    """Keeps the losses, and kills the process."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == options.kill:
            os.kill(os.getpid(), signal.SIGKILL)


watch = Watch()
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(options.model),
    TrainingArguments(
        output_dir=options.folder,
        max_steps=8,
        per_device_train_batch_size=4 // WORLD,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        **engine_arguments(),
    ),
    train_dataset=tiny_texts(size=80),
    callbacks=[watch],
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(f"{options.folder}/final")
told = {"losses": watch.losses, "distributed_type": trainer.accelerator.distributed_type.value}
(Path(options.folder) / f"rank{RANK}.json").write_text(json.dumps(told))
