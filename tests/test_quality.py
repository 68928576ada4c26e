"""benchmarks/quality: the settings that it gives are valid, its error bars are right, and its commands run in a row."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "benchmarks/quality"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    pytest.importorskip("matplotlib", reason="table.py draws: pip install 'trimllm_hf[plot]'")
    monkeypatch.syspath_prepend(str(QUALITY))
    names = ("methods", "pretrain", "run", "table")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = Namespace(**{name: __import__(name) for name in names})
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


def test_every_method_has_a_plan_for_every_depth_of_the_table(quality: Any) -> None:
    from trimllm_hf.schedule import plan_drops

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


def test_time_is_compared_within_a_seed(quality: Any) -> None:
    full = {0: {"cpu_seconds": 10.0}, 1: {"cpu_seconds": 30.0}}
    assert (
        quality.table.share_of_time({0: {"cpu_seconds": 5.0}, 1: {"cpu_seconds": 30.0}, 2: {"cpu_seconds": 9.0}}, full)
        == "0.75"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_run_in_a_row(shared: Path, tmp_path: Path) -> None:
    """From text to a table, with a model that learns nothing: what is checked is what the rows say of themselves."""

    def call(script: str, *flags: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(QUALITY / script), *flags], check=True, env=environment, timeout=300)

    base, results, page = tmp_path / "base", tmp_path / "results", tmp_path / "README.md"
    data = ("--data", str(shared / "data"))
    call("pretrain.py", *data, "--output_dir", str(base), "--layers", "4", "--steps", "2", "--batch_size", "4")
    for method in ("full", "default", "influence-once", "influence-once-time", "head-tuned", "scratch"):
        flags = ("--base", str(base), "--results", str(results), "--steps", "8", "--questions", "20", "--layers", "2")
        call("run.py", *data, *flags, "--domain", "legal", "--method", method)
    call("speed.py", "--base", str(base), "--layers", "2", "--repeats", "2", "--out", str(tmp_path / "speed.json"))
    page.write_text("before\n<!-- quality -->\nold\n<!-- end of quality -->\nafter\n")
    call("table.py", "--results", str(results), "--page", str(page), "--speed", str(tmp_path / "speed.json"))
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("after\n") and "old" not in told
    assert "times as fast as 4 blocks: 2 blocks" in told
    assert told.count("| 2 of 4 |") == 5 and told.count("| 4 of 4 |") == 1
    default = json.loads((results / "legal-default-2-0.json").read_text())
    assert default["layers"] == len(default["kept_layers"]) == 2
    assert list(default["depth_after_step"].values())[-1] == 2
    assert (tmp_path / "quality.png").stat().st_size > 1000
