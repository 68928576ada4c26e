"""Trains the most used ways to use a Trainer, each while it is trimmed, in as many processes as launched.

python rows.py FOLDER {plain,zero2}
"""

import json
import os
import sys
from pathlib import Path

folder, engine = Path(sys.argv[1]), sys.argv[2]
if engine == "zero2":
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from test_training import config  # noqa: E402
from trainer_rows import MOST_USED, ROWS, logged  # noqa: E402

from trimllm_hf import TrimCallback  # noqa: E402

more: dict = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
if engine == "zero2":
    PartialState(backend="gloo")
    batches = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    zero = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    more = {
        "per_device_train_batch_size": 2, "use_cpu": False, "deepspeed": {**batches, **zero},
        "accelerator_config": {"use_configured_state": True},
    }  # fmt: skip
# The Trainer multiplies the loss by the number of processes for models that can be told how many labels there are, also for
# a classifier, whose loss is a mean all the same.
own = {"a sequence's class": {"average_tokens_across_devices": False}}
found = {}
for number, row in enumerate(MOST_USED):
    callbacks = [TrimCallback(config(importance="random", drop_every="2"))]
    AcceleratorState._reset_state()  # accelerate refuses a second Accelerator with a DeepSpeed config
    trainer = ROWS[row](folder / str(number), callbacks, **more, **own.get(row, {}))
    trainer.train()
    found[row] = {
        "type": trainer.accelerator.distributed_type.value,
        "history": [[record["step"], record["dropped"]] for record in trainer.model.config.trim["history"]],
        **{name: logged(trainer, name) for name in ("loss", "learning_rate", "eval_loss")},
    }
    if trainer.args.process_index == 0:
        torch.save(trainer.model.state_dict(), folder / f"{number}.pt")
if engine == "zero2":  # a group a layer, of which a drop would empty one
    AcceleratorState._reset_state()
    trainer = ROWS["own optimizer"](folder / "emptied", [TrimCallback(config(importance="random", drop_every="2"))], **more)
    try:
        trainer.train()
    except ValueError as error:
        found["emptied"] = [str(error), trainer.state.global_step, len(trainer.model.model.layers)]
rank = os.environ.get("RANK", "0")
(folder / f"rank{rank}.json").write_text(json.dumps(found))
trainer.accelerator.wait_for_everyone()
