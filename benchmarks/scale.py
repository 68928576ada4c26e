"""What a scan, a drop, a save and the latency run cost for large models, by arithmetic: the tables of docs/scale.md.

    python benchmarks/scale.py           # print them
    python benchmarks/scale.py --write   # and put them into docs/scale.md, between its marks

Nothing is timed here. The number of block passes is the one that `tests/test_scale.py` counts in a small run; sizes are
those of the configs below; seconds are bytes or operations over the rates below, and so a floor.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/scale.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

EXAMPLES, TOKENS = 64, 512  # of the calibration set (TrimConfig's default), and of each example
GPUS = (1, 8, 64)
MEMORY = 80e9  # bytes of a GPU
FLOPS = 0.4 * 989e12  # a second: dense bf16 of an H100 SXM (NVIDIA's data sheet), two fifths of it used
NODE, NETWORK = 450e9, 50e9  # bytes a second into a GPU: NVLink within 8 (one direction), 400 Gb/s each beyond them
HOST = 64e9  # bytes a second between a GPU and its host: PCIe 5 x16
DISK = 2e9  # bytes a second that a process writes


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes.

    Attributes:
        name: What it is called.
        blocks: Its number.
        width: Of the hidden states.
        block_parameters: Of one block.
        vocabulary: Tokens; embeddings and head hold one row each for every token.
    """

    name: str
    blocks: int
    width: int
    block_parameters: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    def parameters(self, blocks: int) -> int:
        """Of the model with so many blocks; the last norm left out."""
        return blocks * self.block_parameters + 2 * self.head


def llama(name: str, blocks: int, width: int, inner: int, vocabulary: int, kv_width: int) -> Shape:
    return Shape(name, blocks, width, 2 * width * width + 2 * width * kv_width + 3 * width * inner + 2 * width, vocabulary)


SHAPES = (
    llama("Llama-2-7B", 32, 4096, 11008, 32000, 4096),
    llama("Llama-3.1-70B", 80, 8192, 28672, 128256, 1024),
    llama("Llama-3.1-405B", 126, 16384, 53248, 128256, 1024),
)


def sweep_passes(blocks: int) -> int:
    """Block passes of a one-sweep scan of a batch: block i (from 0) runs on the model's own rows and on i candidates'."""
    return blocks * (blocks + 1) // 2


def head_passes(blocks: int) -> int:
    """Head passes of a batch: one for each candidate; where nobody reads the logits, they are made for one token a row."""
    return blocks


def scan_flops(shape: Shape, blocks: int) -> float:
    """Floating-point operations of a scan of the calibration set; two for each weight and token, attention left out."""
    weights = sweep_passes(blocks) * shape.block_parameters + head_passes(blocks) * shape.head
    return 2.0 * weights * EXAMPLES * TOKENS


def run_flops(shape: Shape) -> float:
    """Of all scans that halve the depth one block at a time."""
    return sum(scan_flops(shape, blocks) for blocks in range(shape.blocks, shape.blocks // 2, -1))


def step_flops(shape: Shape) -> float:
    """Of a training step at full depth on as many tokens as the calibration set has: three forward passes."""
    return 6.0 * (shape.blocks * shape.block_parameters + shape.head) * EXAMPLES * TOKENS


def gathered(shape: Shape, blocks: int, gpus: int) -> float:
    """Bytes that a scan brings to each GPU under ZeRO-3 or FSDP2: every block, in bf16, once for each of its batches."""
    batches = EXAMPLES / gpus / min(8, EXAMPLES / gpus)
    return batches * 2.0 * blocks * shape.block_parameters * (gpus - 1) / gpus


def inward(gpus: int) -> float:
    return NODE if gpus <= 8 else NETWORK


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e6:,.0f} MB"


def seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 100 else f"{value / 60:,.0f} min"


def scan_table() -> list[str]:
    lines = [
        "| model | block passes of a scan | of the plain loop's | a scan, in training steps |"
        " all scans to half the depth, in steps |",
        "|---|--:|--:|--:|--:|",
    ]
    for shape in SHAPES:
        n, step = shape.blocks, step_flops(shape)
        lines.append(
            f"| {shape.name}, {n} blocks | {sweep_passes(n):,} | {sweep_passes(n) / (n * (n - 1)):.2f} | "
            f"{scan_flops(shape, n) / step:.1f} | {run_flops(shape) / step:,.0f} |"
        )
    return lines


def cluster_table() -> list[str]:
    lines = [
        "| model | GPUs | training state a GPU | a scan computes | a scan gathers a GPU, ZeRO-3 or FSDP2 |"
        " all scans compute | a drop under ZeRO-3, to the host and back, a GPU |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for shape in SHAPES:
        for gpus in GPUS:
            state = 16.0 * shape.parameters(shape.blocks) / gpus
            fits = "" if state < MEMORY else ", too much"
            bytes_in, moved = gathered(shape, shape.blocks, gpus), 12.0 * shape.parameters(shape.blocks - 1) / gpus
            gather = "none" if gpus == 1 else f"{size(bytes_in)}, {seconds(bytes_in / inward(gpus))}"
            one, every = (seconds(flops / FLOPS / gpus) for flops in (scan_flops(shape, shape.blocks), run_flops(shape)))
            lines.append(
                f"| {shape.name} | {gpus} | {size(state)}{fits} | {one} | {gather} | {every} | "
                f"{size(moved)}, {seconds(2 * moved / HOST)} |"
            )
    return lines


def end_table() -> list[str]:
    lines = [
        "| model | weights, bf16 | half the depth | written in | checkpoint with optimizer | the latency run holds |"
        " on one GPU of 80 GB |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for shape in SHAPES:
        whole, half = (2.0 * shape.parameters(blocks) for blocks in (shape.blocks, shape.blocks // 2))
        fits = "fits" if whole + half < MEMORY else "does not fit"
        lines.append(
            f"| {shape.name} | {size(whole)} | {size(half)} | {seconds(half / DISK)} | {size(7 * half)} | "
            f"{size(whole + half)} | {fits} |"
        )
    return lines


def tables() -> str:
    parts = {"The scan": scan_table(), "On a cluster": cluster_table(), "At the end": end_table()}
    return "\n\n".join(f"### {title}\n\n" + "\n".join(lines) for title, lines in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args().write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(tables())


if __name__ == "__main__":
    main()
