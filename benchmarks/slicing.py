"""Slicing beside dropping blocks and MLP channels: what each costs in perplexity, and what it buys in bytes and speed.

    python benchmarks/quality/base.py --output_dir smollm2             # a base of 135M parameters, once
    python benchmarks/slicing.py --base smollm2 --method redundancy --ratio 0.25
    python benchmarks/slicing.py --base smollm2 --method depth --layers 24 --steps 60
    python benchmarks/slicing.py --base smollm2 --speed                # of the runs without, in turn with the base
    python benchmarks/slicing.py --table                               # what all runs have found

A run makes one model, measures it, fine-tunes it on MedQuAD if --steps are given, measures it again, and adds a line to
--out. Methods: `full`, the base; `uniform` and `redundancy`, hidden states sliced, all layers alike or by their redundancy;
`mlp`, the MLPs' channels by redundancy; `depth`, the blocks of the lowest block influence dropped. All are calibrated on the
same tokens: half of them pieces of books, half answers in MedQuAD's training split. None is in what is measured: a book that
is left out, and answers of the test split. Training: the same rows in the same order, the loss on the answer.

`decode_bytes` are the weights that are read for each token that is generated, `bytes` all of them: the slicing unties the
head from the embedding, and its shortcuts count. Speed depends on shapes alone: --speed builds the models of the runs anew,
with weights that mean nothing, and times each in turn with the base, one thread. On a machine that does other work besides,
`--clock cpu` counts the processor's time of the process.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimllm_hf import drop_layers, measure_latency, score_layers, slice_model
from trimllm_hf.latency import measure
from trimllm_hf.latency.sizes import sizes_of
from trimllm_hf.slicing.channel_shapes import shape_channels
from trimllm_hf.slicing.modules import shape_model
from trimllm_hf.slicing.wiring import find_wiring

CALIBRATION_BOOKS = ("pg11.txt", "pg1661.txt", "pg345.txt", "pg98.txt")
TEST_BOOK = "pg1342.txt"
HERE = Path(__file__).resolve().parent


def pieces(tokenizer: Any, file: Path, number: int, length: int) -> torch.Tensor:
    """The first pieces of a book, behind its preface, of shape (number, length)."""
    text = file.read_text(encoding="utf-8")[20_000 : 20_000 + number * length * 8]
    ids = tokenizer(text, verbose=False).input_ids[: number * length]
    return torch.tensor(ids).view(-1, length)


def answers(tokenizer: Any, file: Path, number: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Questions with their answers, one a batch; only the answer has labels."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    found = []
    for row in rows[:number]:
        asked = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids[: length // 2]
        told = tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids[: length - len(asked)]
        ids = torch.tensor([asked + told])
        labels = torch.tensor([[-100] * len(asked) + told])
        found.append({"input_ids": ids, "labels": labels})
    return found


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several rows as a batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    made: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = longest - row["input_ids"].shape[1]
        made["input_ids"].append(nn.functional.pad(row["input_ids"], (0, missing)))
        made["attention_mask"].append(nn.functional.pad(torch.ones_like(row["input_ids"]), (0, missing)))
        made["labels"].append(nn.functional.pad(row["labels"], (0, missing), value=-100))
    return {name: torch.cat(parts) for name, parts in made.items()}


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """exp of the mean loss over all labelled tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        number = int((batch["labels"][:, 1:] != -100).sum())
        if number:
            total += model(**batch).loss.item() * number
            count += number
    return math.exp(total / count)


def make(args: argparse.Namespace, model: Any, calibration: list[dict[str, torch.Tensor]]) -> list[int] | None:
    """Make the model smaller by the method, in place; the layers' widths, if it has some."""
    if args.method == "depth":
        scores = score_layers(model, calibration, "block_influence", progress=False)
        order = scores.argsort().tolist()
        drop_layers(model, sorted(order[: len(order) - args.layers]))
    elif args.method == "mlp":
        found = slice_model(model, calibration, args.ratio, what="mlp", spread=args.spread, progress=False)
        return list(found.widths)
    elif args.method != "full":
        found = slice_model(model, calibration, args.ratio, args.method, spread=args.spread, progress=False)
        return list(found.widths)
    return None


def train(model: nn.Module, rows: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> None:
    """The same rows in the same order for every method."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(args.steps):
        for group in optimizer.param_groups:  # a warm-up of a tenth, then down to zero
            group["lr"] = args.learning_rate * min((step + 1) / max(1, args.steps // 10), 1 - step / args.steps)
        batch = padded(rows[step * args.batch_size : (step + 1) * args.batch_size])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def speed(args: argparse.Namespace) -> None:
    """Adds to the runs how many times as fast their models are as the base, with the interval of the median."""
    torch.set_num_threads(1)
    if args.clock == "cpu":
        measure.timer = time.process_time
    base: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    rows = runs(args.out)
    for row in rows:
        if row["method"] == "full" or "speed" in row:
            continue
        model = copy.deepcopy(base)
        if row["method"] == "depth":
            drop_layers(model, list(range(row["layers"], len(model.model.layers))))
        elif row["method"] == "mlp":
            shape_channels(model, row["widths"])
        else:
            shape_model(model, find_wiring(type(model), model.config), tuple(row["widths"]))
        report = measure_latency(model, base=base, prompt_tokens=128, new_tokens=32, repeats=7, warmup=1)
        row["speed"] = {found.what: (found.ratio, found.low, found.high) for found in report.speedups}
        row["clock"] = args.clock
        print(row["method"], row["ratio"] or row["layers"], row["speed"], flush=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def runs(file: Path) -> list[dict[str, Any]]:
    """The runs in a file; what was found in several runs of one model stands together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault((row["method"], row["ratio"], row["layers"]), {}).update(row)
    return list(found.values())


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    books, medquad = args.data / "general_books", args.data / "medquad"
    read = [pieces(tokenizer, books / name, args.pieces // 8, args.length) for name in CALIBRATION_BOOKS]
    asked = answers(tokenizer, medquad / "train.jsonl", args.pieces // 2, args.length, seed=1)
    calibration = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in read]
    calibration += [padded(asked[start : start + 4]) for start in range(0, len(asked), 4)]
    calibration = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in calibration]
    general = [
        {"input_ids": p[None], "labels": p[None]} for p in pieces(tokenizer, books / TEST_BOOK, args.tests, args.length)
    ]
    tested = answers(tokenizer, medquad / "test.jsonl", args.tests * 4, args.length // 2, seed=0)
    started = time.process_time()
    widths = make(args, model, calibration)
    seconds = time.process_time() - started
    sizes = sizes_of(model)
    told: dict[str, Any] = {
        "base": args.base.name,
        "method": args.method,
        "ratio": args.ratio if args.method not in ("full", "depth") else None,
        "layers": sizes.num_layers,
        "widths": widths,
        "spread": args.spread if args.method in ("redundancy", "mlp") else None,
        "steps": args.steps,
        "learning_rate": args.learning_rate if args.steps else None,
        "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in calibration),
        "cpu_seconds": seconds,
        "bytes": sizes.weight_bytes,
        "decode_bytes": sizes.decode_bytes,
        "general": perplexity(model, general),
        "answers": perplexity(model, tested),
        "torch": torch.__version__,
    }
    if args.steps:
        rows = answers(
            tokenizer, medquad / "train.jsonl", args.steps * args.batch_size + args.pieces, args.train_length, seed=1
        )
        train(model, rows[args.pieces :], args)
        told |= {"general_after": perplexity(model, general), "answers_after": perplexity(model, tested)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")
    print(json.dumps(told), flush=True)


def table(args: argparse.Namespace) -> None:
    """The runs as a table in Markdown."""
    rows = sorted(runs(args.out), key=lambda row: -row["decode_bytes"])
    print("| method | cut | MB | MB per token | general | answers | general, tuned | answers, tuned | prefill | decode |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cut = f"{row['ratio']:.0%}" if row["ratio"] else f"{row['layers']} blocks"
        tuned = [f"{row[name]:.1f}" if name in row else "" for name in ("general_after", "answers_after")]
        fast = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["speed"][name]) if "speed" in row else "" for name in ("prefill", "decode")
        ]
        sizes = [f"{row[name] / 1e6:.1f}" for name in ("bytes", "decode_bytes")]
        cells = [row["method"], cut, *sizes, f"{row['general']:.1f}", f"{row['answers']:.1f}", *tuned, *fast]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("../shared/models/stories260K"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--method", choices=["full", "uniform", "redundancy", "mlp", "depth"], default="redundancy")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--layers", type=int, help="blocks that are kept, for depth")
    parser.add_argument("--pieces", type=int, default=32, help="of calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece")
    parser.add_argument("--tests", type=int, default=12, help="pieces of the book, and four times as many answers")
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--train_length", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=HERE / "slicing_results/runs.jsonl")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of --speed")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    speed(args) if args.speed else table(args) if args.table else run(args)


if __name__ == "__main__":
    main()
