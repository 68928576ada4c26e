"""`--must-run`: a run of a marker that executes nothing must not look green."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

RUNS = "def test_runs(): pass\n"
FAILS = "def test_fails(): assert False\n"
SKIPS = "import pytest\n@pytest.mark.slow\ndef test_skips(): pytest.skip('no reason')\n"


def run(folder: Path, source: str, *args: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-c", str(TESTS.parent / "setup.cfg"), "-p", "no:cacheprovider"]
    return subprocess.run([*command, *args, str(folder)], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ("source", "args", "code"),
    [
        (RUNS, ["--must-run"], 0),
        (RUNS + SKIPS, ["--must-run"], 0),
        (FAILS, ["--must-run"], 1),
        (SKIPS, ["--must-run"], 1),
        (SKIPS, [], 0),
        (RUNS, ["--must-run", "-m", "slow"], 1),
        (RUNS, ["--must-run", "-n", "2"], 0),
        (FAILS, ["--must-run", "-n", "2"], 1),
        (SKIPS, ["--must-run", "-n", "2"], 1),
    ],
    ids=[
        *("runs", "runs and skips", "fails", "skips", "skips, not asked", "nothing selected"),
        *("runs in workers", "fails in workers", "skips in workers"),
    ],
)
def test_exit_status(tmp_path: Path, source: str, args: list[str], code: int) -> None:
    result = run(tmp_path, source, *args)
    assert result.returncode == code, result.stdout + result.stderr
    said_so = "no test was executed" in result.stdout
    assert said_so == (code == 1 and source != FAILS)


LEAKS = """
import os
def test_leaks(): os.environ["LEFT_BEHIND"] = "1"
def test_next(): assert "LEFT_BEHIND" not in os.environ
def test_clean(monkeypatch): monkeypatch.setenv("LEFT_BEHIND", "1")
"""


def test_a_leaked_environment_variable_fails_the_test_that_leaks(tmp_path: Path) -> None:
    result = run(tmp_path, LEAKS)
    assert re.search("3 passed, .*1 error", result.stdout)
    assert "this test leaves behind: the environment variable LEFT_BEHIND" in result.stdout


GROUP = """
import torch.distributed
def test_leaks(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
def test_next(): assert not torch.distributed.is_initialized()
"""


def test_a_leaked_process_group_fails_the_test_that_leaks(tmp_path: Path) -> None:
    result = run(tmp_path, GROUP)
    assert re.search("2 passed, .*1 error", result.stdout)
    assert "this test leaves behind: a process group" in result.stdout
