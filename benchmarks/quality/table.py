"""The tables and the picture of what `run.py` has measured, written into benchmarks/README.md between its quality marks.

    python benchmarks/quality/table.py            # from benchmarks/quality/results; also writes benchmarks/quality.png

A file of results is a base; NAME-decayed.jsonl holds runs of a base with curves whose learning rate falls to 0. Of a base
whose runs were measured along the way, the table and the picture are of how the loss falls; the picture is of the first
such base. Of the others the table is of what the runs ended with: ± at an accuracy is the larger of two standard errors
of the mean over the seeds, that from the seeds' own spread and that from the number of questions; what a method is above
full depth, and its time, are of the full-depth runs of the same seeds, and ± is the standard error of that difference.
How fast each depth decodes is what `speed.py` measured.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import results
from curves import accuracy, by_steps, curve_tables, ends_tables, grouped, picture, standard_error
from methods import METHODS

HERE = Path(__file__).parent
BEGIN, END = "<!-- quality -->", "<!-- end of quality -->"
DECAYED = "**With a learning rate that falls linearly to 0 at the end of each run** (the Trainer's default schedule)"

Result = dict[str, Any]
Runs = dict[tuple[str, str, int], dict[int, Result]]  # domain, method, layers: by seed


def read(file: Path) -> Runs:
    """All results, by domain, method and depth, and then by seed."""
    found: Runs = defaultdict(dict)
    for (domain, method, target, seed, _), result in results.read(file).items():
        found[domain, method, target][seed] = result
    return dict(found)


def domains_of(found: Runs) -> list[str]:
    """The domains with a run at full depth, to compare with."""
    return sorted({domain for domain, method, _ in found if method == "full"})


def full_depth(found: Runs, domain: str) -> tuple[int, dict[int, Result]]:
    """The base's depth, and its runs."""
    ((depth, runs),) = [(layers, runs) for (of, method, layers), runs in found.items() if (of, method) == (domain, "full")]
    return depth, runs


def loss_above(runs: dict[int, Result], full: dict[int, Result]) -> tuple[float, float]:
    """Loss of the right answers' tokens above that of the full-depth runs of the same seeds, and its standard error."""
    differences = [run["answer_loss"] - full[seed]["answer_loss"] for seed, run in runs.items() if seed in full]
    return statistics.mean(differences), standard_error(differences)


def mean(runs: dict[int, Result], key: str) -> str:
    return f"{statistics.mean(run[key] for run in runs.values()):.3f}"


def above(runs: dict[int, Result], full: dict[int, Result], key: str) -> str:
    """How far a figure is above that of the full-depth runs of the same seeds."""
    differences = [run[key] - full[seed][key] for seed, run in runs.items() if seed in full]
    if not differences:
        return "-"
    error = f" ± {standard_error(differences):.3f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.3f}{error}"


def share_of_time(runs: dict[int, Result], full: dict[int, Result]) -> str:
    """Time, of the full-depth run's at the same seed, where both were timed."""
    both = [(run["seconds"], full[seed]["seconds"]) for seed, run in runs.items() if seed in full]
    shares = [seconds / of_full for seconds, of_full in both if seconds and of_full]
    return f"{statistics.mean(shares):.2f}" if shares else "-"


def tables(found: Runs) -> str:
    """For each domain every method at half depth, the lowest loss first; full depth above them."""
    lines = []
    for domain in domains_of(found):
        depth, full = full_depth(found, domain)
        some = next(iter(full.values()))
        lines += [
            f"**{domain}**: {some['questions']} questions a seed; always the same answer is right in "
            f"{mean(full, 'always_the_same_answer')}.",
            "",
            "| blocks | method | accuracy | loss of the answer | above full depth | time, of full depth's | seeds |",
            "|--:|---|--:|--:|--:|--:|--:|",
        ]
        rows = [(layers, method, runs) for (of, method, layers), runs in found.items() if of == domain]
        for layers, method, runs in sorted(rows, key=lambda row: (-row[0], mean(row[2], "answer_loss"))):
            if layers not in (depth, depth // 2):
                continue
            value, error = accuracy(runs)
            lines.append(
                f"| {layers} of {depth} | {METHODS[method].says} | {value:.3f} ± {error:.3f} | "
                f"{mean(runs, 'answer_loss')} | {above(runs, full, 'answer_loss')} | {share_of_time(runs, full)} | "
                f"{len(runs)} |"
            )
        lines.append("")
    return "\n".join(lines)


def about(name: str, base: dict[str, Any]) -> str:
    """What a base is, in a sentence."""
    shape = (
        f"{base['settings']['layers']} blocks of width {base['settings']['width']}, {base['parameters'] / 1e6:.1f} million"
    )
    if "tokens_seen" not in base:
        return f"#### {name}\n\n{base['name']} ({base['package']}): {shape} parameters."
    return (
        f"#### {name}\n\n{shape}, after {base['tokens_seen'] / 1e6:.1f} million tokens "
        f"(loss on the book {base['held_out_loss']:.2f}); trained on: {base['machine']}, torch {base['torch']}, "
        f"transformers {base['transformers']}."
    )


def speeds(speed: dict[str, Any]) -> str:
    """How fast each depth decodes, in a sentence."""
    some = [
        f"{row['layers']} blocks {row['times_as_fast']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in speed["decode"]
    ]
    return (
        f"Decoding, times as fast as {speed['layers']} blocks: {', '.join(some)} (in brackets the interval of the median, "
        f"{speed['confidence']:.0%} coverage; {speed['environment']['device_name']}, one thread)."
    )


def bases(folder: Path) -> dict[str, Any]:
    """What is known of each base."""
    return {
        file.stem.removeprefix("base-"): json.loads(file.read_text()) for file in sorted(folder.glob("base-*.json"))
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="with a file for each base")
    parser.add_argument(
        "--bases", type=Path, default=HERE, help="where base-NAME.json lies, and speed-NAME.json if there is one"
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "README.md")
    args = parser.parse_args()
    told: list[str] = []
    # a base with curves comes first, and is in the picture
    for name, base in sorted(bases(args.bases).items(), key=lambda item: ("tokens_seen" in item[1], item[0])):
        file, speed = args.results / f"{name}.jsonl", args.bases / f"speed-{name}.json"
        if groups := grouped(results.read(file)):
            told += [about(name, base), "", *curve_tables(groups)]
            if decayed := by_steps(results.read(args.results / f"{name}-decayed.jsonl")):
                told += [DECAYED, "", *ends_tables(decayed)]
            picture(groups, args.page.with_name("quality.png"))
            continue
        found = read(file)
        if not domains_of(found):
            raise SystemExit(f"Expected a result of method 'full' in {file}, got none. Run it first.")
        told += [about(name, base), "", tables(found)]
        told += [speeds(json.loads(speed.read_text())), ""] if speed.exists() else []
    text = args.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    args.page.write_text("\n".join([f"{before}{BEGIN}", "", *told, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
