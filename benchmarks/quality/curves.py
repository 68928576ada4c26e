"""How the loss falls, with tokens and with time: the table and the picture of runs that were measured along the way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from methods import METHODS
from results import Key, Result

STEPS = (0, 40, 80, 120, 200, 300, 400, 500, 600)  # in the table
SHOWN = {"full": "full depth", "influence-repaired": "one cut, repaired", "influence-ranked": "one cut, not repaired"}
RIVAL, REPAIRED = "influence-ranked", ("default", "influence-repaired")
RIVALS = (RIVAL, "angular-once")  # that repair nothing, at the end of runs
COLOURS = dict(zip(SHOWN, ("tab:grey", "tab:green", "tab:orange"), strict=True))

Runs = dict[int, Result]  # by seed
Group = tuple[str, str, int]  # domain, method, blocks


def grouped(found: dict[Key, Result]) -> dict[Group, Runs]:
    """The runs of each domain, method and depth that have a curve of more than its end."""
    groups: dict[Group, Runs] = {}
    for (domain, method, target, seed, _), run in found.items():
        if len(run.get("curve", ())) > 1:
            groups.setdefault((domain, method, target), {})[seed] = run
    return groups


def at_step(run: Result, step: int) -> float | None:
    """The loss after so many steps, where it was measured."""
    return next((point["loss"] for point in run["curve"] if point["step"] == step), None)


def at_time(run: Result, seconds: float) -> float | None:
    """The loss after so many seconds, on the line between the two measurements around; None beyond the last."""
    for one, other in pairwise(run["curve"]):
        if one["seconds"] <= seconds <= other["seconds"]:
            part = (seconds - one["seconds"]) / max(1e-9, other["seconds"] - one["seconds"])
            return float(one["loss"] + part * (other["loss"] - one["loss"]))
    return None


def difference(one: Runs, other: Runs, step: int, by_time: bool) -> list[float]:
    """By how much the loss of some runs is above that of others with the same seed, after that many steps of the others.

    By time: `one` gets the seconds that `other` took for these steps, choosing and repairing included.
    """
    found = []
    for seed in sorted(one.keys() & other.keys()):
        there = next((point for point in other[seed]["curve"] if point["step"] == step), None)
        if there is None:
            continue
        here = at_time(one[seed], there["seconds"]) if by_time else at_step(one[seed], step)
        if here is not None:
            found.append(here - there["loss"])
    return found


def mean_and_error(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean, and its standard error where there are several."""
    if not values:
        return "-"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{error}"


def loss_table(groups: dict[Group, Runs], domain: str, steps: Sequence[int]) -> list[str]:
    """A row for each method and depth: loss along the way, and seconds."""
    lines = [
        "| blocks | method | "
        + " | ".join("before training" if step == 0 else f"after {step} steps" for step in steps)
        + " | choosing and repairing, s | training, s a step | seeds |",
        "|--:|---|" + "--:|" * (len(steps) + 3),
    ]
    for (of, method, target), runs in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][2], item[0][1])):
        if of != domain:
            continue
        losses = [
            mean_and_error([loss for run in runs.values() if (loss := at_step(run, step)) is not None]) for step in steps
        ]
        ends = [(run["curve"][0], run["curve"][-1]) for run in runs.values()]
        before = statistics.mean(first["seconds"] for first, _ in ends)
        each = statistics.mean((last["seconds"] - first["seconds"]) / last["step"] for first, last in ends)
        lines.append(
            f"| {target} | {METHODS[method].says} | {' | '.join(losses)} | {before:.0f} | {each:.1f} | {len(runs)} |"
        )  # fmt: skip
    return lines


def draw(groups: dict[Group, Runs], domain: str, file: Path) -> None:
    """Loss against CPU time, a panel for each depth that was trained, with full depth in all, and a line for each seed."""
    steps = {group: max(run["curve"][-1]["step"] for run in runs.values()) for group, runs in groups.items()}
    trained = {group for group, of_group in steps.items() if of_group >= max(steps.values()) / 10}
    targets = sorted({target for of, method, target in trained if of == domain and method != "full"}, reverse=True)
    figure, axes = plt.subplots(1, len(targets), figsize=(4.2 * len(targets), 3.4), squeeze=False, sharey=True)
    for axis, target in zip(axes[0], targets, strict=True):
        for (of, method, depth), runs in sorted(groups.items()):
            if of != domain or method not in SHOWN or (method != "full" and depth != target):
                continue
            for number, run in enumerate(runs.values()):
                points = [(point["seconds"], point["loss"]) for point in run["curve"]]
                label = SHOWN[method] if number == 0 else None
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[method], label=label)
        axis.set(title=f"{target} blocks", xlabel="CPU seconds, choosing and repairing included", ylim=(None, 6.5))
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("loss per token of the answers")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def curve_tables(groups: dict[Group, Runs]) -> list[str]:
    """For each domain the loss along the way, and what a repair gains in the same steps and in the same time."""
    lines = []
    for domain in sorted({domain for domain, _, _ in groups}):
        of_domain = [runs for (of, _, _), runs in groups.items() if of == domain]
        measured = {point["step"] for runs in of_domain for run in runs.values() for point in run["curve"]}
        lines += [f"**{domain}**", "", *loss_table(groups, domain, [step for step in STEPS if step in measured]), ""]
        lines += [*gains(groups, domain, sorted(measured)), ""]
    return lines


def gains(groups: dict[Group, Runs], domain: str, steps: Sequence[int]) -> list[str]:
    """By how much the loss of the plain cut is above that of each repaired one."""
    lines = [
        "| blocks | repaired | after its steps | plain minus repaired, same tokens | same CPU time | seeds |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for target in sorted({target for of, method, target in groups if of == domain and method != "full"}, reverse=True):
        plain = groups.get((domain, RIVAL, target), {})
        for method in REPAIRED:
            repaired = groups.get((domain, method, target), {})
            for step in steps:
                by_tokens, by_time = (difference(plain, repaired, step, by_time) for by_time in (False, True))
                if by_tokens:
                    cells = f"{mean_and_error(by_tokens, 3, '+')} | {with_count(by_time, len(by_tokens))}"
                    lines.append(f"| {target} | {METHODS[method].says} | {step} | {cells} | {len(by_tokens)} |")
    return lines if len(lines) > 2 else []


def by_steps(found: dict[Key, Result]) -> dict[tuple[str, str, int, int], Runs]:
    """The runs of each domain, method, depth and number of steps: where the learning rate falls only the end counts."""
    groups: dict[tuple[str, str, int, int], Runs] = {}
    for (domain, method, target, seed, steps), run in found.items():
        groups.setdefault((domain, method, target, steps), {})[seed] = run
    return groups


def ends_tables(groups: dict[tuple[str, str, int, int], Runs]) -> list[str]:
    """What each method ends with, and how the defaults compare with full depth and the plain cut at the same seeds.

    A plain cut got as many steps as the defaults, or as many more as they spend on choosing and repairing.
    """
    lines = [
        "| domain | blocks | method | steps | before training | at the end | accuracy | choosing, repairing, s | in all, s "
        "| seeds |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -item[0][2], item[0][1], item[0][3]))
    for (domain, method, target, steps), runs in ordered:
        first, last = ([run["curve"][at] for run in runs.values()] for at in (0, -1))
        starts, ends = (mean_and_error([point["loss"] for point in points]) for points in (first, last))
        before, seconds = (statistics.mean(point["seconds"] for point in points) for points in (first, last))
        chosen = all("accuracy" in run for run in runs.values())
        right = "{:.3f} ± {:.3f}".format(*accuracy(runs)) if chosen else "-"
        lines.append(
            f"| {domain} | {target} | {METHODS[method].says} | {steps} | {starts} | {ends} | {right} | {before:.0f} "
            f"| {seconds:.0f} | {len(runs)} |"
        )
    lines += [
        "",
        "| domain | blocks | the defaults, steps | beside | steps | CPU time, of the defaults' | loss, minus the defaults' "
        "| accuracy, the defaults' minus | seeds |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for (domain, method, target, steps), ours in ordered:
        if method != REPAIRED[0]:
            continue
        for (of, other, depth, their_steps), theirs in ordered:
            seeds = sorted(ours.keys() & theirs.keys())
            rival = other in RIVALS and depth == target
            if of != domain or not seeds or not (rival or other == "full"):
                continue
            pairs = [(theirs[seed], ours[seed]) for seed in seeds]
            losses = [one["curve"][-1]["loss"] - mine["curve"][-1]["loss"] for one, mine in pairs]
            times = [one["curve"][-1]["seconds"] / mine["curve"][-1]["seconds"] for one, mine in pairs]
            right = [mine["accuracy"] - one["accuracy"] for one, mine in pairs if "accuracy" in one and "accuracy" in mine]
            lines.append(
                f"| {domain} | {target} | {steps} | {METHODS[other].says} | {their_steps} | {statistics.mean(times):.2f} "
                f"| {mean_and_error(losses, 3, '+')} | {mean_and_error(right, 3, '+')} | {len(seeds)} |"
            )
    return [*lines, ""]


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def accuracy(runs: Runs) -> tuple[float, float]:
    """Mean over the seeds, and its standard error: from the seeds or from the questions, whichever is larger."""
    values = [run["accuracy"] for run in runs.values()]
    by_questions = sqrt(sum(run["standard_error"] ** 2 for run in runs.values())) / len(values)
    return statistics.mean(values), max(by_questions, standard_error(values))


def with_count(values: Sequence[float], seeds: int) -> str:
    """Mean and error, and of how many seeds where they are fewer: a plain cut that was stopped early has no later loss."""
    fewer = f" ({len(values)} of {seeds})" if 0 < len(values) < seeds else ""
    return mean_and_error(values, 3, "+") + fewer


def picture(groups: dict[Group, Runs], file: Path) -> None:
    """The domain with the most runs, as `draw` shows it."""
    domains = {domain for domain, _, _ in groups}
    draw(
        groups, max(domains, key=lambda of: sum(len(runs) for (domain, _, _), runs in groups.items() if domain == of)), file
    )
