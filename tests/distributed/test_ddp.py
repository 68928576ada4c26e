"""DistributedDataParallel: two processes train as one does, and resume as one does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "scripts" / "train.py"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, SCRIPT, folder], check=True, timeout=240)
    result: dict[str, Any] = torch.load(folder / "rank0.pt")
    assert result["distributed_type"] == "NO"
    return result


def test_two_processes_equal_one(torchrun, one_process: dict[str, Any], tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["distributed_type"] == "MULTI_CPU"
        assert rank["kept_layers"] == one_process["kept_layers"] and len(rank["kept_layers"]) == 4
        assert rank["alive"] == [0, 0]
        assert rank["unchanged"] == [True, True]
        assert rank["rates"] == one_process["rates"]
        assert len(rank["losses"]) == 12
        assert rank["losses"] == pytest.approx(one_process["losses"], abs=1e-5)
        for name, value in one_process["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=0, atol=1e-5)
    assert all(torch.equal(ranks[0]["weights"][name], value) for name, value in ranks[1]["weights"].items())


def test_resume(torchrun, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path / "run"), "--save", "4", "--calibration", "8")
    torchrun("train.py", str(tmp_path / "again"), "--resume", str(tmp_path / "run" / "checkpoint-4"), "--calibration", "8")
    run, again = (torch.load(tmp_path / name / "rank0.pt") for name in ("run", "again"))
    assert again["distributed_type"] == "MULTI_CPU"
    assert run["kept_layers"] == again["kept_layers"]
    for name, value in run["weights"].items():
        torch.testing.assert_close(again["weights"][name], value, rtol=0, atol=1e-6)
