"""All processes drop or none does; and a loop without a Trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("score", ["KeyError", "'the second process has no such column'"]),
        ("guard", ["ValueError", "the second process refuses"]),
    ],
)
def test_an_error_on_one_process_stops_all(where: str, said: list[str], torchrun, tmp_path: Path) -> None:
    torchrun("fail.py", str(tmp_path), where, timeout=120)
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result == {"raised": said, "step": 2, "layers": 6, "trim": False}


def test_a_loop_without_a_trainer(torchrun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run([sys.executable, SCRIPTS / "loop.py", one], check=True, timeout=120)
    torchrun("loop.py", str(two))
    alone, both = (json.loads((folder / "rank0.json").read_text()) for folder in (one, two))
    assert alone["type"] == "NO" and both["type"] == "MULTI_CPU"
    assert alone["kept"] == both["kept"] == [0, 3, 4, 5] and both["steps"] == [3, 6]
    assert both["rates"] == alone["rates"]
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert both["weights"] == pytest.approx(alone["weights"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["block_influence", "sensitivity"])
@pytest.mark.parametrize("call", [1, 6], ids=["in the first pass", "later"])
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)])
def test_out_of_memory_in_a_scan_ends_all(engine: str, call: int, importance: str, torchrun, tmp_path: Path) -> None:
    """Each process waits for the shards of the other: without being told, the survivor would wait for ever."""
    how = ["--engine", engine, "--importance", importance, "--out_of_memory", str(call)]
    torchrun("train.py", str(tmp_path), *how, timeout=150)
    survivor, failed = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert failed["raised"] == ["OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB."]
    assert survivor["raised"][0] == "RuntimeError"
    assert "Process 1 failed: OutOfMemoryError: CUDA out of memory. Tried" in survivor["raised"][1]
    assert survivor["step"] == failed["step"]
