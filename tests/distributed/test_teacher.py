"""With a teacher, two processes end where one does, under each engine; and resume there."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_each_engine import ENGINES, SCRIPT, check_equal, one_rank

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DISTILL = ("--distill", "0.5", "--calibration", "8")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, without = (tmp_path_factory.mktemp(name) for name in ("with", "without"))
    subprocess.run([sys.executable, SCRIPT, folder, *DISTILL], check=True, timeout=240)
    subprocess.run([sys.executable, SCRIPT, without, "--save", "12", "--calibration", "8"], check=True, timeout=240)
    assert one_rank(folder)["losses"] != one_rank(without)["losses"]  # the teacher has a say
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine: str, torchrun, one_process: Path, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine, *DISTILL, "--save", "4")
    check_equal(tmp_path, engine, one_process, 1e-5)
    torchrun("train.py", str(tmp_path), "--engine", engine, *DISTILL, "--resume", str(tmp_path / "checkpoint-4"))
    check_equal(tmp_path, engine, one_process, 1e-5)
