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
