"""Runs a recipe under an engine on the CPU, in as many processes as launched.

python recipe.py NAME --engine {plain,zero2} FLAGS

DeepSpeed runs on the CPU only by the detours below: `use_cpu` would silently mean DDP.
"""

import importlib
import json
import os
import sys
from pathlib import Path

name, engine, flags = sys.argv[1], sys.argv[3], sys.argv[4:]
if engine.startswith("zero"):
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

from accelerate import PartialState  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

RECIPES = Path(__file__).parents[3] / "recipes"
sys.path.insert(0, str(RECIPES))
if engine == "plain":
    flags += ["--use_cpu", "--ddp_backend", "gloo"]
else:
    PartialState(backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(engine[4])},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    file = Path(flags[flags.index("--output_dir") + 1]).with_name(f"{engine}-{os.environ.get('RANK', 0)}.json")
    file.write_text(json.dumps(config), encoding="utf-8")
    flags += ["--deepspeed", str(file), "--accelerator_config", '{"use_configured_state": true}']
sys.argv = [str(RECIPES / f"{name}.py"), *flags]
importlib.import_module(name).main(flags)
print(f"{engine}: {AcceleratorState().distributed_type.value} on {PartialState().num_processes} processes")
