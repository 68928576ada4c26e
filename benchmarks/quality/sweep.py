"""Run every row of the comparison that has no line of results yet, several at once.

    python benchmarks/quality/sweep.py --processes 2
    python benchmarks/quality/sweep.py --processes 12 --device cuda --base BASE --results 24x384.jsonl

Full depth and every method at half of it; the methods of `EVERY_DEPTH` at a quarter, a third and three quarters as well.
What sweep.py does not know of is a flag of run.py's, for every row. Stopped, it goes on where it was.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import results
import run
from methods import METHODS
from transformers import AutoConfig

EVERY_DEPTH = ("default", "influence-once")
DOMAINS = ("answers", "legal", "finance")


def rows(depth: int, methods: list[str], more: list[float]) -> Iterator[tuple[str, int]]:
    """Methods and the blocks that they keep, in the order in which they are run."""
    for method in methods:
        yield method, depth // 2
        if method in EVERY_DEPTH:
            yield from ((method, round(depth * share)) for share in more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=run.DOMAINS, default=DOMAINS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--more_depths", nargs="*", type=float, default=[1 / 4, 1 / 3, 3 / 4])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args, more = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    more += ["--base", str(args.base), "--results", str(args.results)]
    depth = AutoConfig.from_pretrained(args.base).num_hidden_layers
    wanted = [
        (domain, method, layers, seed)
        for method, layers in rows(depth, args.methods, args.more_depths)
        for seed in args.seeds
        for domain in args.domains
    ]
    there = {key[:4] for key, result in results.read(args.results).items() if not result.get("unfinished")}
    missing = [key for key in wanted if (key if key[1] != "full" else (key[0], "full", depth, key[3])) not in there]
    print(f"{len(missing)} of {len(wanted)} rows are missing", flush=True)
    failed = 0
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for later in (False, True):  # who gets the time of another waits until that one has run
            due = [key for key in missing if (METHODS[key[1]].time_of is not None) == later]
            waiting = {pool.submit(run.main, [*flags_of(key), *more]): key for key in due}
            for done in as_completed(waiting):
                if error := done.exception():
                    failed += 1
                    print(f"{waiting[done]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(missing)} rows failed.")


def flags_of(key: tuple[str, str, int, int]) -> list[str]:
    """What tells run.py which row to run."""
    names = ("--domain", "--method", "--layers", "--seed")
    return [text for name, value in zip(names, key, strict=True) for text in (name, str(value))]


if __name__ == "__main__":
    main()
