"""What a drop costs, in units of the same run's training step, and what memory it takes; for one engine a run.

    python benchmarks/drop.py                                                         # one process
    torchrun --nproc_per_node 2 benchmarks/drop.py --engine ddp                       # or fsdp2, zero1, zero2, zero3
    python benchmarks/drop.py --device cuda --dtype bf16 --hidden_size 2048 --layers 16   # about 1B parameters, one GPU

A hand-written Accelerate loop trains a random Llama on random tokens: a few steps to settle, timed steps, then a drop of
one layer, timed on its own (guard included, scoring not), then steps again. Memory on the CPU is the resident set, read
each millisecond by a thread; on a GPU the allocator's peak. Prints one line of a table and writes JSON to --out. For
engines on the CPU see tests/distributed/scripts/train.py: they take detours.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", default="local", choices=["local", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
parser.add_argument("--hidden_size", type=int, default=512)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--batch_size", type=int, default=4, help="sequences a process")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--steps", type=int, default=5, help="timed steps on each side of the drop")
parser.add_argument("--drops", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
options = parser.parse_args()
if options.engine.startswith("zero"):
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
if options.engine == "fsdp2":
    os.environ["FSDP_VERSION"] = "2"

import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from trimllm_hf import drop_prepared_layers  # noqa: E402
from trimllm_hf.surgery.drop import plan_drop  # noqa: E402


def make_accelerator() -> Accelerator:
    precision = "bf16" if options.dtype == "bf16" else "no"
    if options.engine in ("local", "ddp"):
        return Accelerator(cpu=options.device == "cpu", mixed_precision=precision)
    if options.engine == "fsdp2":
        if options.device == "cpu":
            state = PartialState(cpu=True)
            state.device = torch.device("cpu")
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin: Any = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
        )
        return Accelerator(fsdp_plugin=plugin, mixed_precision=precision)
    if options.device == "cpu":
        PartialState(backend="gloo")
    zero = {"stage": int(options.engine[-1])}
    config = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": options.dtype == "bf16"},
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


class Peak(threading.Thread):
    """The highest memory of this process while it runs, in bytes."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.done = threading.Event()
        self.process = psutil.Process()
        self.start_bytes = self.bytes = self.now()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start()
        return self

    def now(self) -> int:
        return torch.cuda.memory_allocated() if options.device == "cuda" else self.process.memory_info().rss

    def run(self) -> None:
        while options.device == "cpu" and not self.done.wait(0.001):
            self.bytes = max(self.bytes, self.now())

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.join()
        self.bytes = torch.cuda.max_memory_allocated() if options.device == "cuda" else max(self.bytes, self.now())


def timed(accelerator: Accelerator, work: Any) -> float:
    accelerator.wait_for_everyone()
    if options.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if options.device == "cuda":
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter() - start


def main() -> None:
    accelerator = make_accelerator()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 64),
    )
    model: Any = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    model.train()
    parameters = model.num_parameters()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.device == "cuda")
    plan_drop(model, [1])  # as TrimCallback does when training begins: what the guard sets up once is not a drop's
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(0, 8192, (options.batch_size, options.length), device=accelerator.device)

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)

    for _ in range(2):
        step()
    with Peak() as of_step:
        step_seconds = [timed(accelerator, step) for _ in range(options.steps)]
    rows = []
    for number in range(options.drops):
        with Peak() as of_drop:
            drop = partial(drop_prepared_layers, accelerator, model, optimizer, [1], step=number)
            seconds = timed(accelerator, drop)
        with Peak() as of_steps:
            for _ in range(2):
                step()
        gc.collect()
        with Peak() as after:
            pass
        memory = {"peak": of_drop.bytes, "before": of_drop.start_bytes, "after": after.bytes, "step_peak": of_steps.bytes}
        rows.append({"seconds": seconds, **memory})
    unit = statistics.median(step_seconds)
    result = {
        "engine": options.engine,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "parameters": parameters,
        "layers": options.layers,
        "step_seconds": unit,
        "step_peak_bytes": of_step.bytes,
        "drops": rows,
        "drop_in_steps": [row["seconds"] / unit for row in rows],
        "drop_peak_over_step_peak": max(row["peak"] for row in rows) / of_step.bytes,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine(),
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"drop-{options.engine}.json").write_text(json.dumps(result, indent=2) + "\n")
        drops = ", ".join(f"{value:.2f}" for value in result["drop_in_steps"])
        print(
            f"| {options.engine} | {accelerator.num_processes} | {unit:.2f} s | {drops} | "
            f"{result['drop_peak_over_step_peak']:.2f} |"
        )
    accelerator.wait_for_everyone()


main()
