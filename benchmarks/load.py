"""What loading only the kept layers costs: bytes read from disk, peak memory, time, against loading all and dropping.

    python benchmarks/load.py                     # a random Llama of 24 blocks, 0.7 GB, made in a temporary folder
    python benchmarks/load.py --blocks 8 --width 512

Each way runs in a process of its own, after the files were put out of the page cache. Bytes read are /proc/self/io's
`read_bytes` (what the block device delivered; Linux only). Peak memory is the growth of the resident set over what the
imports need, sampled every millisecond: of its anonymous part (what the process itself holds), and of all (with the pages
of mapped files, which the kernel can take back).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    """Make the base, run both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--shard", default="200MB")
    parser.add_argument("--way", choices=["kept", "all"], help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kept = [layer for layer in range(arguments.blocks) if layer % 2 == 0]
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.base, kept)))
        return
    with tempfile.TemporaryDirectory(dir=".") as base:
        make(base, arguments.blocks, arguments.width, arguments.shard)
        rows = {}
        for way in ("kept", "all"):
            drop_from_page_cache(Path(base))
            command = [sys.executable, __file__, "--way", way, "--base", base, "--blocks", str(arguments.blocks)]
            rows[way] = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
    needed = rows["kept"]["bytes"]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{len(kept)} of {arguments.blocks} blocks kept, {needed / 1e6:.1f} MB of tensors; {machine}")
    print(f"{'':32}{'load_kept_layers':>18}{'load all, drop':>18}")
    labels = {"read": "read from disk", "own": "peak memory", "resident": "with mapped files"}
    for name, label in ((name, f"{label} / kept bytes") for name, label in labels.items()):
        print(f"{label:32}{rows['kept'][name] / needed:18.3f}{rows['all'][name] / needed:18.3f}")
    print(f"{'time, s':32}{rows['kept']['time']:18.2f}{rows['all']['time']:18.2f}")


def make(base: str, blocks: int, width: int, shard: str) -> None:
    """Write a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size=shard)


def drop_from_page_cache(folder: Path) -> None:
    """So that what is read has to come from the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(way: str, base: str, kept: list[int]) -> dict[str, float]:
    """Load in one way; bytes read, peak memory, seconds, and the bytes of the model that came out."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (imported before the clock starts)

    from trimllm_hf import drop_layers, load_kept_layers

    before, held = io_read(), resident()
    peak, stop = list(held), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[:] = map(max, peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if way == "kept":
        model = load_kept_layers(base, kept)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        drop_layers(model, [layer for layer in range(model.config.num_hidden_layers) if layer not in kept])
    with torch.no_grad():
        sum(parameter.sum() for parameter in model.parameters())  # a mapped tensor is read when it is used
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "read": io_read() - before,
        "own": peak[0] - held[0],
        "resident": peak[1] - held[1],
        "time": seconds,
        "bytes": size,
    }


def io_read() -> int:
    """Bytes that this process has had the block device fetch."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def resident() -> list[int]:
    """Bytes of memory that this process holds: without mapped files, and with them."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(found[name].split()[0]) for name in ("RssAnon", "VmRSS")]


if __name__ == "__main__":
    main()
