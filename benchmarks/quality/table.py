"""The tables and the picture of what `run.py` has measured, written into benchmarks/README.md between its quality marks.

    python benchmarks/quality/table.py            # from benchmarks/quality/results; also writes benchmarks/quality.png

A file of results is a base. ± at an accuracy is the larger of two standard errors of the mean over the seeds: that from
the seeds' own spread, and that from the number of questions. What a method is above or below full depth, and its time, are
of the full-depth runs of the same seeds, and ± is the standard error of that difference. The picture is of the first
base. How fast each depth decodes is what `speed.py` measured.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import results
from methods import METHODS

HERE = Path(__file__).parent
BEGIN, END = "<!-- quality -->", "<!-- end of quality -->"

Result = dict[str, Any]
Runs = dict[tuple[str, str, int], dict[int, Result]]  # domain, method, layers: by seed


def read(file: Path) -> Runs:
    """All results, by domain, method and depth, and then by seed."""
    found: Runs = defaultdict(dict)
    for (domain, method, target, seed), result in results.read(file).items():
        found[domain, method, target][seed] = result
    return dict(found)


def domains_of(found: Runs) -> list[str]:
    """The domains with a run at full depth, to compare with."""
    return sorted({domain for domain, method, _ in found if method == "full"})


def full_depth(found: Runs, domain: str) -> tuple[int, dict[int, Result]]:
    """The base's depth, and its runs."""
    ((depth, runs),) = [(layers, runs) for (of, method, layers), runs in found.items() if (of, method) == (domain, "full")]
    return depth, runs


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def accuracy(runs: dict[int, Result]) -> tuple[float, float]:
    """Mean over the seeds, and its standard error: from the seeds or from the questions, whichever is larger."""
    values = [run["accuracy"] for run in runs.values()]
    by_questions = sqrt(sum(run["standard_error"] ** 2 for run in runs.values())) / len(values)
    return statistics.mean(values), max(by_questions, standard_error(values))


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
    """For each domain and depth every method that was run, the lowest loss first."""
    lines = []
    for domain in domains_of(found):
        depth, full = full_depth(found, domain)
        some = next(iter(full.values()))
        lines += [
            f"**{domain}**: {some['questions']} questions a seed; always the same answer is right in "
            f"{mean(full, 'always_the_same_answer')}.",
            "",
            "| blocks | method | accuracy | above full depth | loss of the answer | above full depth | loss on the book "
            "| questions trained on | time, of full depth's | seeds |",
            "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        rows = [(layers, method, runs) for (of, method, layers), runs in found.items() if of == domain]
        for layers, method, runs in sorted(rows, key=lambda row: (-row[0], mean(row[2], "answer_loss"))):
            value, error = accuracy(runs)
            lines.append(
                f"| {layers} of {depth} | {METHODS[method].says} | {value:.3f} ± {error:.3f} | "
                f"{above(runs, full, 'accuracy')} | {mean(runs, 'answer_loss')} | {above(runs, full, 'answer_loss')} | "
                f"{mean(runs, 'book_loss')} | {statistics.mean(run['trained_questions'] for run in runs.values()):.0f} | "
                f"{share_of_time(runs, full)} | {len(runs)} |"
            )
        lines.append("")
    return "\n".join(lines)


def about(name: str, base: dict[str, Any]) -> str:
    """What a base is, in a sentence."""
    return (
        f"#### {name}\n\n{base['settings']['layers']} blocks of width {base['settings']['width']}, "
        f"{base['parameters'] / 1e6:.1f} million parameters, after {base['tokens_seen'] / 1e6:.1f} million tokens "
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


def lines_of(found: Runs, domain: str, value: Any) -> dict[str, list[tuple[int, float, float]]]:
    """Depth, value and error of each method that was run at several depths; full depth is in all of them."""
    points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for (of, method, layers), runs in found.items():
        if of == domain:
            points[method].append((layers, *value(runs)))
    (full,) = points.pop("full")
    return {method: sorted([*some, full]) for method, some in points.items() if len(some) > 1}


def picture(found: Runs, speed: dict[str, Any] | None, file: Path) -> None:
    """Accuracy (where it is at chance, loss), and speed against depth: a line for each method run at several depths."""
    panels: list[tuple[str, str, dict[str, list[tuple[int, float, float]]], float | None]] = []
    for domain in domains_of(found):
        _, full = full_depth(found, domain)
        constant = statistics.mean(run["always_the_same_answer"] for run in full.values())
        at_chance = accuracy(full)[0] - constant < accuracy(full)[1]
        kind = "loss above full depth" if at_chance else "accuracy"
        value: Any = partial(loss_above, full=full) if at_chance else accuracy
        if lines := lines_of(found, domain, value):
            panels.append((domain, kind, lines, None if at_chance else constant))
    if speed is not None:
        decode = [(speed["layers"], 1.0, 0.0), *((row["layers"], row["times_as_fast"], 0.0) for row in speed["decode"])]
        panels.append(("decoding", "times as fast as full depth", {"any method": decode}, None))
    if panels:
        draw(panels, file)


def draw(panels: Iterable[tuple[str, str, dict[str, list[tuple[int, float, float]]], float | None]], file: Path) -> None:
    """A panel for each title, label of the values, lines, and level of always the same answer."""
    panels = list(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), squeeze=False)
    for axis, (title, label, lines, constant) in zip(axes[0], panels, strict=True):
        for method, points in sorted(lines.items()):
            depths, values, errors = zip(*points, strict=True)
            axis.errorbar(depths, values, errors, label=method, capsize=2, marker="o", markersize=3)
        if constant is not None:
            axis.axhline(constant, color="grey", linestyle=":", linewidth=1, label="always the same answer")
            axis.set_ylim(0, 1)
        else:
            axis.set_ylim(0, None)
        axis.set(title=title, xlabel="blocks", ylabel=label)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="with a file for each base")
    parser.add_argument(
        "--bases", type=Path, default=HERE, help="where base-NAME.json lies, and speed-NAME.json if there is one"
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "README.md")
    args = parser.parse_args()
    told: list[str] = []
    for base in sorted(args.bases.glob("base-*.json")):
        name = base.stem.removeprefix("base-")
        found, speed = read(args.results / f"{name}.jsonl"), args.bases / f"speed-{name}.json"
        if not domains_of(found):
            raise SystemExit(f"Expected a result of method 'full' in {args.results / name}.jsonl, got none. Run it first.")
        decode = json.loads(speed.read_text()) if speed.exists() else None
        if not told:
            picture(found, decode, args.page.with_name("quality.png"))
        told += [about(name, json.loads(base.read_text())), "", tables(found)]
        told += [speeds(decode), ""] if decode else []
    text = args.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    args.page.write_text("\n".join([f"{before}{BEGIN}", "", *told, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
