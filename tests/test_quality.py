"""benchmarks/quality: the settings that it gives are valid, its error bars are right, and its commands run in a row."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "benchmarks/quality"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    pytest.importorskip("matplotlib", reason="table.py draws: pip install 'trimllm_hf[plot]'")
    monkeypatch.syspath_prepend(str(QUALITY))
    names = ("results", "clocks", "curves", "methods", "pretrain", "tasks", "run", "sweep", "table")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = Namespace(**{name: __import__(name) for name in names})
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


def test_every_method_has_a_plan_for_every_depth_of_the_table(quality: Any) -> None:
    from trimllm_hf.training.schedule import plan_drops

    for name, method in quality.methods.METHODS.items():
        if method.trim is not None:
            for layers in (9, 6, 4, 3):
                trim = quality.run.make_trim(method, method.trim, layers, 12, 200, 0)
                depth = 24 if trim.unit == "sublayer" else 12
                target = trim.resolve_target(depth, depth)
                plan = plan_drops(trim, depth, target, 200)
                assert sum(plan.values()) == depth - target, name


def test_an_error_is_the_larger_of_the_seeds_and_the_questions(quality: Any) -> None:
    alike = {seed: {"accuracy": 0.5, "standard_error": 0.03} for seed in range(4)}
    assert quality.table.accuracy(alike) == pytest.approx((0.5, 0.03 / 2))
    apart = {seed: {"accuracy": value, "standard_error": 0.01} for seed, value in enumerate((0.4, 0.6))}
    assert quality.table.accuracy(apart) == pytest.approx((0.5, sqrt(0.02) / sqrt(2)))


def test_a_difference_is_taken_within_a_seed(quality: Any) -> None:
    full = {0: {"seconds": 10.0, "answer_loss": 1.0}, 1: {"seconds": 30.0, "answer_loss": 3.0}}
    runs = {0: {"seconds": 5.0, "answer_loss": 1.25}, 1: {"seconds": 30.0, "answer_loss": 3.35}, 2: {"seconds": 9.0}}
    assert quality.table.share_of_time(runs, full) == "0.75"
    assert quality.table.above(runs, full, "answer_loss") == "+0.300 ± 0.050"
    assert quality.table.share_of_time({0: {"seconds": None}}, full) == "-"  # it shared a GPU


def test_equal_time_is_what_the_other_took(quality: Any) -> None:
    def run(*points: tuple[int, float, float]) -> dict[str, Any]:
        return {"curve": [dict(zip(("step", "seconds", "loss"), point, strict=True)) for point in points]}

    plain = {0: run((0, 10.0, 6.0), (40, 90.0, 4.0), (80, 170.0, 3.0)), 1: run((0, 10.0, 6.0), (40, 90.0, 4.5))}
    repaired = {0: run((0, 50.0, 4.0), (40, 130.0, 3.0)), 1: run((0, 50.0, 4.0), (40, 130.0, 3.2)), 2: run((0, 9.0, 1.0))}
    curves = quality.curves
    assert curves.difference(plain, repaired, 40, by_time=False) == pytest.approx([1.0, 1.3])
    assert curves.difference(plain, repaired, 40, by_time=True) == pytest.approx([0.5])  # 130 s; seed 1 had no more than 90
    assert curves.difference(plain, repaired, 0, by_time=True) == pytest.approx([1.0, 1.25])
    full = {
        seed: {"curve": [{"step": 40, "seconds": 260.0, "loss": 2.0}], "accuracy": 0.75, "standard_error": 0.01}
        for seed in (0, 1)
    }
    labelled = {seed: {**run, "accuracy": 0.5 + seed / 4, "standard_error": 0.01} for seed, run in repaired.items()}
    ends = {("writing", "influence-ranked", 15, 80): plain, ("writing", "default", 15, 40): labelled}
    ends |= {("writing", "full", 30, 40): full, ("legal", "influence-ranked", 15, 40): plain}
    assert curves.ends_tables(ends)[-3:-1] == [  # 3.0 - 3.0 at 170 of 130 s, 4.5 - 3.2 at 90 of 130
        "| writing | 15 | 40 | full depth | 40 | 2.00 | -1.100 ± 0.100 | -0.125 ± 0.125 | 2 |",
        f"| writing | 15 | 40 | {curves.METHODS['influence-ranked'].says} | 80 | 1.00 | +0.650 ± 0.650 | - | 2 |",
    ]


def test_the_end_of_text_may_begin_a_piece(quality: Any) -> None:
    """Its gradient was infinite in a model of this size while the row of that token began as zeros."""
    model = quality.pretrain.make_model(24, 96, 64)
    ids = torch.tensor([[0, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_sweep_begins_with_half_depth(quality: Any) -> None:
    rows = list(quality.sweep.rows(12, ["full", "default", "scratch"], [1 / 4, 3 / 4]))
    assert rows == [("full", 6), ("default", 6), ("default", 3), ("default", 9), ("scratch", 6)]


def test_a_run_is_one_line_and_replaces_the_one_before_it(quality: Any, tmp_path: Path) -> None:
    file = tmp_path / "of/base.jsonl"
    keys = [
        {"domain": "legal", "method": method, "target": 4, "seed": seed, "steps": 9} for method in "ba" for seed in (1, 0)
    ]
    for loss in (1.0, 2.0):
        for key in keys:
            quality.results.add(file, {**key, "answer_loss": loss})
    lines = file.read_text().splitlines()
    assert len(lines) == len(keys)
    assert list(quality.results.read(file)) == sorted(map(quality.results.key_of, keys))
    assert {result["answer_loss"] for result in quality.results.read(file).values()} == {2.0}


@pytest.mark.parametrize("file", sorted((QUALITY / "results").glob("*.jsonl")), ids=lambda file: file.stem)
def test_what_was_measured_reads_as_it_is_written(quality: Any, file: Path, tmp_path: Path) -> None:
    rows = quality.results.read(file)
    quality.results.write(tmp_path / "again.jsonl", rows.values())
    assert (tmp_path / "again.jsonl").read_text() == file.read_text()
    assert {method for _, method, *_ in rows} <= quality.methods.METHODS.keys()


def test_measuring_takes_its_own_time(quality: Any) -> None:
    """A stopwatch has the seconds of the callback between its two; a curve those of all but its own measurements."""
    now, state, points = [0.0], Namespace(global_step=0, num_input_tokens_seen=0), []
    watch = quality.clocks.Stopwatch(lambda: now[0])

    def takes(seconds: float) -> float:
        now[0] += seconds
        return 1.5

    curve = quality.clocks.Curve([0, 2], lambda: now[0], lambda model: takes(100.0), points.append)
    dropping = quality.clocks.Calls(lambda: takes(5.0))
    callbacks = [watch.before, dropping, watch.after, curve]
    for event in ("on_train_begin", "on_step_begin", "on_step_end", "on_step_end"):
        if event == "on_step_end":
            takes(1.0)
            state.global_step += 1
        for callback in callbacks:
            getattr(callback, event)(None, state, None, model=None)
    assert watch.seconds == 4 * 5.0
    assert [(point["step"], point["seconds"], point["loss"]) for point in points] == [(0, 10.0, 1.5), (2, 22.0, 1.5)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_in_a_row(shared: Path, tmp_path: Path) -> None:
    """From text to a table, with a model that learns nothing: what is checked is what the rows say of themselves."""

    def call(script: str, *flags: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(QUALITY / script), *flags], check=True, env=environment, timeout=600)

    base, results, page = tmp_path / "tiny", tmp_path / "results/tiny.jsonl", tmp_path / "README.md"
    data = ("--data", str(shared / "data"))
    call("pretrain.py", *data, "--output_dir", str(base), "--layers", "4", "--steps", "2", "--batch_size", "4")
    flags = ("--base", str(base), "--results", str(results), "--steps", "8", "--questions", "20")
    call("run.py", *data, *flags, "--domain", "legal", "--method", "full")
    methods = ("full", "scan-quarter", "influence-once", "influence-once-time", "head-tuned", "scratch")
    few = ("--seeds", "0", "--more_depths", "--processes", "2")
    call("sweep.py", *data, *flags, *few, "--domains", "legal", "--methods", *methods)
    call("sweep.py", *data, *flags, *few, "--domains", "answers", "--methods", "full", "influence-once")
    shutil.copy(base / "base.json", tmp_path / "base-tiny.json")
    along = ("--evaluate_at", "0", "4", "--constant", "--max_length", "48")
    for method in ("full", "influence-ranked", "influence-repaired"):
        row = ("--domain", "writing", "--method", method, "--layers", "2", "--results", str(tmp_path / "results/real.jsonl"))
        call("run.py", *data, *flags, *row, *along)
    (tmp_path / "base-real.json").write_text(
        json.dumps({"name": "Real", "package": "real==1", "settings": {"layers": 4, "width": 96}, "parameters": 1})
    )
    call("speed.py", "tiny", "--folder", str(tmp_path), "--repeats", "2")
    page.write_text("before\n<!-- quality -->\nold\n<!-- end of quality -->\nafter\n")
    call("table.py", "--results", str(tmp_path / "results"), "--bases", str(tmp_path), "--page", str(page))
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("after\n") and "old" not in told
    assert "times as fast as 4 blocks: 3 blocks" in told
    assert told.count("| 2 of 4 |") == 5 + 1 and told.count("| 4 of 4 |") == 1 + 1
    assert told.count("| 2 | ") == 2 + 3 and "same CPU time" in told  # two methods, and three moments to compare them at
    assert page.with_name("quality.png").stat().st_size > 1000
