"""The tables and the picture of what `run.py` has measured, written into benchmarks/README.md between its quality marks.

    python benchmarks/quality/table.py            # from benchmarks/quality/results; also writes benchmarks/quality.png

± is the larger of two standard errors of the mean over the seeds: that from the seeds' own spread, and that from the number
of questions. What a method is above or below full depth, and its CPU time, are of the full-depth runs of the same seeds.
How fast each depth decodes is what `speed.py` measured.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from methods import METHODS

HERE = Path(__file__).parent
BEGIN, END = "<!-- quality -->", "<!-- end of quality -->"

Result = dict[str, Any]
Runs = dict[tuple[str, str, int], dict[int, Result]]  # domain, method, layers: by seed


def read(folder: Path) -> Runs:
    """All results, by domain, method and depth, and then by seed."""
    found: Runs = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        # a sublayer model has all of its blocks; the file's name says how deep it is counted
        layers = result["layers"] if result["method"] == "full" else int(file.stem.split("-")[-2])
        found[result["domain"], result["method"], layers][result["seed"]] = result
    return dict(found)


def accuracy(runs: dict[int, Result]) -> tuple[float, float]:
    """Mean over the seeds, and its standard error: from the seeds or from the questions, whichever is larger."""
    values = [run["accuracy"] for run in runs.values()]
    by_questions = sqrt(sum(run["standard_error"] ** 2 for run in runs.values())) / len(values)
    by_seeds = statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), max(by_questions, by_seeds)


def mean(runs: dict[int, Result], key: str) -> str:
    return f"{statistics.mean(run[key] for run in runs.values()):.3f}"


def above(runs: dict[int, Result], full: dict[int, Result]) -> str:
    """Accuracy, less that of the full-depth runs of the same seeds."""
    differences = [run["accuracy"] - full[seed]["accuracy"] for seed, run in runs.items() if seed in full]
    return f"{statistics.mean(differences):+.3f}" if differences else "-"


def share_of_time(runs: dict[int, Result], full: dict[int, Result]) -> str:
    """CPU time, of the full-depth run's at the same seed."""
    shares = [run["cpu_seconds"] / full[seed]["cpu_seconds"] for seed, run in runs.items() if seed in full]
    return f"{statistics.mean(shares):.2f}" if shares else "-"


def tables(found: Runs, domains: Sequence[str]) -> str:
    """For each domain and depth every method that was run, the most accurate first."""
    lines = []
    for domain in domains:
        ((depth, full),) = [
            (layers, runs) for (of, method, layers), runs in found.items() if (of, method) == (domain, "full")
        ]
        some = next(iter(full.values()))
        lines += [
            f"**{domain}**: {some['questions']} questions a seed; always the same answer is right in "
            f"{mean(full, 'always_the_same_answer')}.",
            "",
            "| blocks | method | accuracy | above full depth | loss of the answer | loss on the book "
            "| questions trained on | CPU time, of full depth's | seeds |",
            "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        rows = [(layers, method, runs) for (of, method, layers), runs in found.items() if of == domain]
        for layers, method, runs in sorted(rows, key=lambda row: (-row[0], -accuracy(row[2])[0])):
            value, error = accuracy(runs)
            lines.append(
                f"| {layers} of {depth} | {METHODS[method].says} | {value:.3f} ± {error:.3f} | {above(runs, full)} | "
                f"{mean(runs, 'answer_loss')} | {mean(runs, 'book_loss')} | "
                f"{statistics.mean(run['trained_questions'] for run in runs.values()):.0f} | {share_of_time(runs, full)} | "
                f"{len(runs)} |"
            )
        lines.append("")
    return "\n".join(lines)


def speeds(speed: dict[str, Any]) -> str:
    """How fast each depth decodes, in a sentence."""
    some = [
        f"{row['layers']} blocks {row['times_as_fast']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in speed["decode"]
    ]
    return (
        f"Decoding, times as fast as {speed['layers']} blocks: {', '.join(some)} (in brackets the interval of the median, "
        f"{speed['confidence']:.0%} coverage; {speed['environment']['device_name']}, one thread)."
    )


def picture(found: Runs, domains: Sequence[str], speed: dict[str, Any] | None, file: Path) -> None:
    """Accuracy and speed against depth: a line for each method that was run at several depths, a panel for each domain."""
    lines: dict[str, dict[str, list[tuple[int, float, float]]]] = defaultdict(dict)
    for domain in domains:
        points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for (of, method, layers), runs in found.items():
            if of == domain:
                points[method].append((layers, *accuracy(runs)))
        (full,) = points.pop("full")
        lines[domain] = {method: sorted([*some, full]) for method, some in points.items() if len(some) > 1}
    drawn = [domain for domain in domains if lines[domain]]
    wide = len(drawn) + (speed is not None)
    if not wide:
        return
    figure, panels = plt.subplots(1, wide, figsize=(3.4 * wide, 3.2), squeeze=False)
    for panel, domain in zip(panels[0], drawn, strict=False):
        for method, some in lines[domain].items():
            depths, values, errors = zip(*some, strict=True)
            panel.errorbar(depths, values, errors, label=method, capsize=2, marker="o", markersize=3)
        runs = next(runs for (of, method, _), runs in found.items() if (of, method) == (domain, "full"))
        constant = statistics.mean(run["always_the_same_answer"] for run in runs.values())
        panel.axhline(constant, color="grey", linestyle=":", linewidth=1, label="always the same answer")
        panel.set(title=domain, xlabel="blocks", ylabel="accuracy", ylim=(0, 1))
        panel.legend(fontsize=7)
    if speed is not None:
        points_of_speed = [(speed["layers"], 1.0), *((row["layers"], row["times_as_fast"]) for row in speed["decode"])]
        panels[0][-1].plot(*zip(*points_of_speed, strict=True), color="black", marker="o", markersize=3)
        panels[0][-1].set(title="decoding", xlabel="blocks", ylabel="times as fast as full depth", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--speed", type=Path, default=HERE / "speed.json", help="what speed.py wrote; may be missing")
    parser.add_argument("--page", type=Path, default=HERE.parent / "README.md")
    args = parser.parse_args()
    found = read(args.results)
    domains = sorted({domain for domain, method, _ in found if method == "full"})
    if not domains:
        raise SystemExit(f"Expected a result of method 'full' in {args.results}, got none. Run run.py --method full first.")
    text = args.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    speed = json.loads(args.speed.read_text()) if args.speed.exists() else None
    told = tables(found, domains) + (f"\n{speeds(speed)}\n" if speed else "")
    args.page.write_text(f"{before}{BEGIN}\n\n{told}\n{END}{after}", encoding="utf-8")
    picture(found, domains, speed, args.page.with_name("quality.png"))


if __name__ == "__main__":
    main()
