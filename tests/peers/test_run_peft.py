"""What a table of a peer's tests counts, by logs written by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run_peft


def write(work: Path, mode: str, **outcomes: str) -> None:
    lines = [
        {"id": f"tests/test_a.py::{name}", "outcome": outcome, "trimmed": name != "without_model", "said": f"of {mode}"}
        for name, outcome in outcomes.items()
    ]
    run_peft.log_of(work, mode).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_fails_on_trimmed_models_only_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_peft, "assumptions", lambda peer: {"tests/test_a.py::counts": "it counts the layers"})
    write(
        tmp_path, "in_memory", both="passed", late="passed", lost="failed", counts="failed", broken="failed",
        left_out="skipped", without_model="failed",
    )  # fmt: skip
    write(tmp_path, "reloaded", both="passed", late="failed")
    write(tmp_path, "untrimmed", late="passed", lost="passed", counts="passed", broken="failed")
    rows, only = run_peft.table(tmp_path)
    assert rows[-1] == "| all | 5 | 2 | 1 | 1 | 1 | 1 | 2 |"
    assert only == ["tests/test_a.py::late: of reloaded", "tests/test_a.py::lost: of in_memory"]


def test_any_part_of_the_order_stands_for_all_files_and_tuners() -> None:
    tuners = ["Lora", "AdaLora", "IA3"]
    many = [f"tests/test_a.py::test_{n}[{tuner}Config-model{m}]" for n in range(9) for tuner in tuners for m in range(9)]
    few = ["tests/test_b.py::test_x[LoraConfig-model]", "tests/test_c.py::test_x", "tests/test_c.py::TestC::test_y[1]"]
    order = run_peft.in_rounds([*many, *few])
    assert sorted(order) == sorted([*many, *few]) and order == run_peft.in_rounds(reversed(order))
    groups = [run_peft.group_of(name) for name in order]
    assert len(set(groups[:6])) == 6 == len(set(groups)), "a round has one of each"
    assert len(set(groups[6:9])) == 3 and {path for path, _ in groups[6:]} == {"test_a.py"}
    assert order[0::2] != sorted(order[0::2]), "not by name"


def test_the_assumptions_have_a_reason() -> None:
    for peer in ("peft", "trl"):
        assert all(len(reason) > 10 for reason in run_peft.assumptions(peer).values())


TOY = """
import pytest
from peers_log import models, modes

@pytest.fixture(scope="module")
def of_mode():
    return modes.mode

@pytest.mark.parametrize("number", range(50))
def test_passes(of_mode, number):
    models["trimmed"] += modes.mode != "untrimmed"
    assert of_mode == modes.mode

def test_without_model(): pass

class TestMore:
    def test_fails_trimmed(self):
        models["trimmed"] += 1
        assert modes.mode == "untrimmed"

    def test_fails_late(self):
        models["trimmed"] += 1
        assert modes.mode != "reloaded"

    def test_fails(self):
        models["trimmed"] += 1
        raise OSError("not there")

def test_is_skipped(): pytest.skip("no")
"""


def outcomes(work: Path, mode: str) -> dict[str, str]:
    return {name.rpartition("::")[2]: line["outcome"] for name, line in run_peft.results(work, mode).items()}


@pytest.mark.parametrize("stopped", [False, True])
def test_each_mode_runs_what_it_is_for(stopped: bool, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(TOY)
    (tmp_path / "of_a_peer.py").write_text(
        "from peers_log import switches\nswitches.append(lambda mode: print('now', mode))"
    )
    passes = {f"test_passes[{number}]": "passed" for number in range(50)}
    if stopped:  # after some tests in one mode
        ran = [{"id": f"tests/test_toy.py::test_passes[{n}]", "outcome": "passed", "trimmed": 1} for n in range(0, 50, 3)]
        run_peft.log_of(tmp_path, "in_memory").write_text("".join(json.dumps(line) + "\n" for line in ran))
    run_peft.run(tmp_path, tmp_path, "of_a_peer", " ".join(run_peft.MODES), ["test_toy.py"], [], PYTHONPATH=str(tmp_path))
    late = {"test_fails_late": "passed"}
    found = {
        "test_without_model": "passed",
        "test_fails_trimmed": "failed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
    }
    assert outcomes(tmp_path, "in_memory") == {**passes, **late, **found}
    assert outcomes(tmp_path, "reloaded") == {**passes, "test_fails_late": "failed"}
    assert outcomes(tmp_path, "untrimmed") == {
        "test_fails_trimmed": "passed",
        "test_fails": "failed",
        "test_fails_late": "passed",
    }
    lines = [len(run_peft.log_of(tmp_path, mode).read_text().splitlines()) for mode in run_peft.MODES]
    assert lines == [55, 51, 3], "each of them once"
    _, only = run_peft.table(tmp_path)
    assert {name.rpartition("::")[2].partition(":")[0] for name in only} == {"test_fails_trimmed", "test_fails_late"}
