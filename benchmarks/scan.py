"""The one-sweep scan beside the plain loop: time, scores, and peak memory against the budget.

    python benchmarks/scan.py                                                  # CPU, all shapes, a few minutes
    python benchmarks/scan.py --shapes llama-1b --device cuda --dtype bfloat16 # a GPU

The plain loop takes each block out of the list in turn and runs the model on each batch: N passes through N - 1 blocks.
Both run in this process on the same model and batches, in turn, so that drift meets both; medians of the repeats. On a CPU
that does other work besides, `--clock cpu --threads 1` counts the seconds in which it did this work.
With --drops the ways to choose several blocks are compared instead: a scan anew for each (the sweep above, and then the
block goes), a lazy one, lazy ones among the 10, 4 and 1 of the lowest block influence, and one ranking by block influence.
--base takes a folder with a real model, and --text what it is scored on: some of its pieces choose, and the loss on others
is told as well.

    python benchmarks/scan.py --drops 15 --threads 1 --clock cpu --base SMOLLM2 --text ../shared/data/general_books/pg11.txt

Memory is the rise of the peak above that of one forward pass: on a GPU the allocator's, on the CPU that of the resident
set, read each millisecond by a thread. Prints a table and writes JSON to --out.
"""

import argparse
import copy
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimllm_hf import drop_layers, score_layers
from trimllm_hf.importance import evaluate_metric
from trimllm_hf.importance.lazy import PassedOver, greedy_layers

Batches = list[dict[str, torch.Tensor]]

# blocks, width, rows, tokens, words
SHAPES = {
    "tiny": (6, 64, 2, 16, 128),  # to try the options
    "small-24": (24, 128, 4, 32, 512),
    "small-32": (32, 128, 4, 32, 512),
    "memory-24": (24, 256, 8, 128, 512),
    "memory-24-narrow": (24, 128, 8, 128, 512),
    "llama-1b": (16, 2048, 4, 512, 32000),
}


def make(shape: str, device: str, dtype: torch.dtype) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    blocks, width, rows, tokens, words = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=width * 11 // 4 if width < 2048 else 8192,
        num_hidden_layers=blocks,
        num_attention_heads=max(2, width // 64),
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(0, words, (2, rows, tokens), device=device)
    return model, [{"input_ids": part, "labels": part} for part in ids]


@torch.no_grad()
def plain(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Each layer's leave-one-out loss, by N passes through N - 1 blocks."""
    blocks, scores = list(model.model.layers), []
    for position in range(len(blocks)):
        model.model.layers = torch.nn.ModuleList(blocks[:position] + blocks[position + 1 :])
        scores.append(sum(model(**batch, use_cache=False).loss.item() for batch in batches) / len(batches))
    model.model.layers = torch.nn.ModuleList(blocks)
    return torch.tensor(scores, dtype=torch.float64)


def load(base: Path, text: Path, rows: int, tokens: int, dtype: torch.dtype) -> tuple[Any, Batches, Batches]:
    """A real model, batches to choose by, and others to measure on."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    ids = AutoTokenizer.from_pretrained(base)(text.read_text(encoding="utf-8"), verbose=False).input_ids
    pieces = torch.tensor(ids[: 4 * rows * tokens]).view(4, rows, tokens)
    batches = [{"input_ids": piece, "labels": piece} for piece in pieces]
    return model, batches[:1], batches[1:]


def anew(model: Any, batches: Batches, drops: int) -> list[int]:
    """Positions that go by a scan anew for each, in the base's numbering."""
    smaller, left, gone = copy.deepcopy(model), list(range(len(model.model.layers))), []
    for _ in range(drops):
        scores = score_layers(smaller, batches)
        lowest = min(range(1, len(left) - 1), key=lambda position: scores[position].item())
        drop_layers(smaller, [lowest])
        gone.append(left.pop(lowest))
    return gone


def by_influence(model: Any, batches: Batches, drops: int) -> list[int]:
    scores = score_layers(model, batches, "block_influence")
    return sorted(range(1, len(scores) - 1), key=lambda position: scores[position].item())[:drops]


def select(name: str, model: Any, batches: Batches, test: Batches, args: argparse.Namespace) -> dict[str, Any]:
    """Each way's blocks, their time, and the loss without them: on what chose, and on what did not."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    ways: dict[str, Callable[[], Sequence[int]]] = {
        "scan anew for each": lambda: anew(model, batches, args.drops),
        "lazy": lambda: greedy_layers(model, batches, args.drops).layers,
        **{
            f"lazy, the {width} likeliest": lambda width=width: greedy_layers(model, batches, args.drops, width=width).layers
            for width in (10, 4, 1)
        },
        "block influence": lambda: by_influence(model, batches, args.drops),
    }
    rows: list[dict[str, Any]] = []
    for way, choose in ways.items():
        start = clock()
        layers = sorted(choose())
        seconds = clock() - start
        with PassedOver(model).without(layers):
            losses = [evaluate_metric(model, of) for of in (batches, test)]
        rows.append({"way": way, "layers": layers, "seconds": seconds, "loss": losses[0], "test_loss": losses[1]})
        first, alike = rows[0], len({*layers} & {*rows[0]["layers"]})
        print(
            f"| {name} | {way} | {seconds:.1f} s | {seconds / first['seconds']:.3f} | {alike} of {args.drops} | "
            f"{losses[0]:.4f} | {losses[0] / first['loss'] - 1:+.1%} | {losses[1]:.4f} |",
            flush=True,
        )
    return {"shape": name, "drops": args.drops, "rows": rows, "clock": args.clock, "dtype": args.dtype, **environment(args)}


class Peak(threading.Thread):
    """The highest memory while it runs, in bytes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.done, self.process = device, threading.Event(), psutil.Process()

    def __enter__(self) -> "Peak":
        self.start_bytes = self.bytes = self.now()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start()
        return self

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else self.process.memory_info().rss

    def run(self) -> None:
        while self.device == "cpu" and not self.done.wait(0.001):
            self.bytes = max(self.bytes, self.now())

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.join()
        self.bytes = torch.cuda.max_memory_allocated() if self.device == "cuda" else max(self.bytes, self.now())

    @property
    def rise(self) -> int:
        return self.bytes - self.start_bytes


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    model, batches = make(shape, args.device, getattr(torch, args.dtype))
    with Peak(args.device) as of_forward, torch.no_grad():
        model(**batches[0], use_cache=False)
    with Peak(args.device) as of_scan:
        scores = score_layers(model, batches, memory_gb=args.memory_gb)
    reference = plain(model, batches)
    threads = torch.get_num_threads()
    how: dict[str, Any] = {"globals": {**globals(), **locals()}, "num_threads": threads}
    if args.clock == "cpu":
        how["timer"] = time.process_time
    timers = {
        "plain": Timer("plain(model, batches)", **how),
        "sweep": Timer("score_layers(model, batches)", **how),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(args.repeats):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(1).median)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    blocks, width, rows, tokens, _ = SHAPES[shape]
    return {
        "shape": shape,
        "blocks": blocks,
        "width": width,
        "rows": rows,
        "tokens": tokens,
        "seconds": medians,
        "all_seconds": seconds,
        "ratio": medians["sweep"] / medians["plain"],
        "ratios": [one / other for one, other in zip(seconds["sweep"], seconds["plain"], strict=True)],
        "largest_difference": (scores - reference).abs().max().item(),
        "budget_bytes": args.memory_gb * 1e9,
        "rise_over_forward_bytes": max(0, of_scan.rise - of_forward.rise),
        "clock": args.clock,
        "dtype": args.dtype,
        **environment(args),
    }


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small-24", "small-32", "memory-24"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory_gb", type=float, default=0.1, help="budget of the scan whose memory is measured")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--drops", type=int, help="compare ways to choose so many blocks")
    parser.add_argument("--base", type=Path, help="with --drops: a folder with a model, instead of the shapes")
    parser.add_argument("--text", type=Path, help="with --base: a text")
    parser.add_argument("--rows", type=int, default=6, help="with --base: pieces of 64 tokens that choose")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    if args.clock == "cpu" and (args.device != "cpu" or args.threads != 1):
        parser.error("--clock cpu adds the threads' seconds up and does not see a GPU's: give --device cpu --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.drops:
        print("| model | blocks chosen by | time | of the scan's | the same | loss | above the scan's | on other text |")
        print("|---|---|---|---|---|---|---|---|")
        for name in args.shapes if args.base is None else [args.base.name]:
            if args.base is None:
                model, batches = make(name, args.device, getattr(torch, args.dtype))
                found = select(name, model, batches[:1], batches[1:], args)
            else:
                found = select(name, *load(args.base, args.text, args.rows, 64, getattr(torch, args.dtype)), args)
            (args.out / f"select-{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        return
    print("| shape | blocks | batch | plain | one sweep | ratio | from - to | largest difference | memory, of budget |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        found = measure(shape, args)
        (args.out / f"scan-{shape}.json").write_text(json.dumps(found, indent=2) + "\n")
        print(
            f"| {shape} | {found['blocks']} | {found['rows']} x {found['tokens']} | {found['seconds']['plain']:.2f} s | "
            f"{found['seconds']['sweep']:.2f} s | {found['ratio']:.2f} | {min(found['ratios']):.2f} - "
            f"{max(found['ratios']):.2f} | {found['largest_difference']:.1e} | "
            f"{found['rise_over_forward_bytes'] / 1e6:.0f} of {found['budget_bytes'] / 1e6:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
