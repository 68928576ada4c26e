"""Everything that needs a GPU, in one command of at most ten minutes; and the sections of README.md that it fills.

    python benchmarks/gpu.py                     # one GPU with 40 GB: writes benchmarks/gpu.json
    python benchmarks/gpu.py --toy               # the same commands on tiny shapes and the CPU, to see that they run
    python benchmarks/gpu.py --readme            # writes the sections of benchmarks/README.md anew, from benchmarks/gpu.json
    python benchmarks/gpu.py --only drop latency # those whose names begin so

Each part is one of the other scripts in a process of its own, with its options as printed: `latency.py` (Llama-2-7B and
Llama-3.1-8B in bf16, full and half depth; dynamic and static cache, compiled; the quantized rivals), `scan.py` (a Llama of
1B: a full scan beside the plain loop, and lazy ones), `drop.py` (1B, under each engine, one process, NCCL). One that fails,
or for which no time is left, is recorded with the reason, and the next one runs. What has been measured is in the file
after each part, so nothing is lost when the machine goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD, README = HERE / "gpu.json", HERE / "README.md"
ENGINES = ("local", "ddp", "fsdp2", "zero1", "zero2", "zero3")
CACHES = {
    "dynamic": ["--rivals", "int8", "nf4", "torchao-int8", "torchao-int4"],
    "static": ["--cache", "static"],
    "compiled": ["--cache", "static", "--compile"],
}
DROP_HEADS = "| engine | processes | training step | the drops, in steps | peak memory, of a step's |\n|---|--:|--:|--:|--:|"
LEAST = 20  # seconds that are left, below which nothing is begun


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: What it measures.
        script: Which script, with its options.
        processes: How many `torchrun` starts; 0: none, the script runs by itself.
        needs: Packages without which it is not run.
        limit: Seconds that it may take.
    """

    name: str
    script: tuple[str, ...]
    processes: int = 0
    needs: tuple[str, ...] = ()
    limit: float = 120.0

    def command(self, out: Path) -> list[str]:
        """What is run, with where it writes."""
        script, *options = self.script
        start = [sys.executable]
        if self.processes:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return [*start, str(HERE / script), *options, "--out", str(out)]


@dataclass
class Outcome:
    """What came of a part: its table as printed, the figures that it wrote, or why there are none."""

    name: str
    command: str
    seconds: float = 0.0
    not_run: str | None = None
    printed: str = ""
    results: dict[str, Any] = field(default_factory=dict)


def parts(toy: bool) -> list[Part]:
    """All parts, those first that are looked for first."""
    device = ("--device", "cpu" if toy else "cuda")
    of_latency = (*device, *(("--new-tokens", "3", "--repeats", "2") if toy else ("--dtype", "bfloat16")))
    of_scan = (*device, *(("--repeats", "1") if toy else ("--dtype", "bfloat16", "--repeats", "3")))
    size = ("--hidden_size", "64", "--layers", "6", "--drops", "2", "--steps", "2", "--length", "16")
    of_drop = (*device, *(size if toy else ("--dtype", "bf16", "--hidden_size", "2048", "--layers", "16", "--drops", "5")))
    shapes, block = (("tiny",), "tiny") if toy else (("llama-2-7b", "llama-3.1-8b"), "llama-1b")
    found = [
        Part(f"latency, {shape}, {cache}", ("latency.py", "--shapes", shape, *of_latency, *options), limit=150)
        for cache, options in CACHES.items()
        for shape in shapes
    ]
    found.insert(len(shapes), Part("scan", ("scan.py", "--shapes", block, *of_scan)))
    found.insert(
        len(shapes) + 1, Part("selection", ("scan.py", "--shapes", block, "--drops", "3" if toy else "8", *of_scan))
    )
    drops = [
        Part(
            f"drop, {engine}",
            ("drop.py", "--engine", engine, *of_drop),
            processes=0 if engine == "local" else 1,
            needs=("deepspeed",) if engine.startswith("zero") else (),
            limit=200 if engine == "zero1" else 90,  # the first one compiles an extension
        )
        for engine in ENGINES
    ]
    return [*found[: len(shapes) + 2], *drops, *found[len(shapes) + 2 :]]


def run(part: Part, out: Path, until: float) -> Outcome:
    """Run a part; what goes wrong in it is its outcome."""
    out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(part.name, " ".join(["benchmarks/" + part.script[0], *part.script[1:]]))
    left = until - time.monotonic()
    if missing := [name for name in part.needs if find_spec(name) is None]:
        outcome.not_run = f"{', '.join(missing)} is not installed"
    elif left < LEAST:
        outcome.not_run = "no time was left"
    if outcome.not_run:
        return outcome
    start = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(part.command(out), **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=min(part.limit, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            printed, errors = process.communicate()
            outcome.not_run = f"not done after {min(part.limit, left):.0f} s"
    outcome.seconds = round(time.monotonic() - start, 1)
    if process.returncode and outcome.not_run is None:
        outcome.not_run = reason(errors) or f"exit status {process.returncode}"
    outcome.printed = printed.strip()
    outcome.results = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))}
    return outcome


def reason(errors: str) -> str:
    """The error in a traceback: torchrun prints its own below that of the script."""
    found = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", errors, re.MULTILINE)
    real = [line for line in found if "ChildFailedError" not in line]
    return (real or [""])[-1][:300]


def machine() -> dict[str, Any]:
    """What it all ran on, as its driver and packages say."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        device = "no GPU"
    return {"device": device, "python": platform.python_version(), "cores": os.cpu_count()}


# ---- README.md


def sections(record: dict[str, Any] | None) -> dict[str, str]:
    """Text of each section of README.md: what was printed, and what was not run, with the reason."""
    outcomes = [] if record is None else [Outcome(**plain) for plain in record["outcomes"]]
    found = {}
    for name in ("latency", "scan", "selection", "drop"):
        of_name = [outcome for outcome in outcomes if outcome.name.startswith(name)]
        if record is None or not of_name:
            found[name] = f"**Not run: on a GPU.** `python benchmarks/gpu.py --only {name}` is the run for one."
            continue
        told = [f"On {record['machine']['device']}:"]
        rows = [outcome.printed for outcome in of_name if outcome.printed]
        if name == "drop" and rows:
            told += ["\n".join([DROP_HEADS, *rows])]
            told += [f"- {outcome.name}: {held(outcome)}" for outcome in of_name if outcome.results]
        else:
            told += [outcome.printed for outcome in of_name if outcome.printed]
        told += [f"**Not run: {outcome.name}**: {outcome.not_run}." for outcome in of_name if outcome.not_run]
        found[name] = "\n\n".join(told)
    return found


def held(outcome: Outcome) -> str:
    """Peak memory of a training step before the drops and after each."""
    (result,) = outcome.results.values()
    peaks = [result["step_peak_bytes"], *(row["step_peak"] for row in result["drops"])]
    return "peak of a training step, GB, before and after each drop: " + ", ".join(f"{peak / 1e9:.2f}" for peak in peaks)


def rewritten(readme: str, record: dict[str, Any] | None) -> str:
    """README.md with its sections as the record says; one without our marks stays out."""
    for name, text in sections(record).items():
        marks = re.compile(rf"(<!-- gpu: {name} -->\n).*?(<!-- /gpu: {name} -->)", re.DOTALL)
        readme = marks.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme)
    return readme


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or write README.md; 0 if there was nothing to report as not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--record", type=Path, help="the JSON file; with --toy runs/benchmarks/gpu-toy.json")
    parser.add_argument("--readme", action="store_true", help="only write README.md's sections, from the record")
    args = parser.parse_args(argv)
    path = args.record or (Path("runs/benchmarks/gpu-toy.json") if args.toy else RECORD)
    if args.readme:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        README.write_text(rewritten(README.read_text(encoding="utf-8"), record), encoding="utf-8")
        return 0
    until = time.monotonic() + 60 * args.minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"toy": args.toy, "machine": machine(), "outcomes": []}
    chosen = [part for part in parts(args.toy) if part.name.startswith(tuple(args.only))]
    for number, part in enumerate(chosen):
        outcome = run(part, path.parent / "gpu-parts" / re.sub(r"\W+", "-", part.name), until)
        record["outcomes"].append(asdict(outcome))
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        said = "not run: " + outcome.not_run if outcome.not_run else f"{outcome.seconds:.0f} s"
        print(f"[{number + 1} of {len(chosen)}] {part.name}: {said}", flush=True)
        if outcome.printed:
            print(outcome.printed, flush=True)
    return int(any(outcome["not_run"] for outcome in record["outcomes"]))


if __name__ == "__main__":
    raise SystemExit(main())
