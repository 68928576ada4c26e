"""Under DDP a run stops where one process does, and every process holds the same, right weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "scripts" / "stop.py"


@pytest.mark.parametrize(
    ("reason", "depths"),
    [
        pytest.param("metric", [[3, 5], [5, 4], [12, 5]], id="metric"),
        pytest.param("latency", [[2, 5], [4, 4]], id="latency", marks=pytest.mark.slow),
    ],
)
def test_two_processes_stop_as_one(reason: str, depths: list[list[int]], torchrun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run([sys.executable, SCRIPT, one, reason], check=True, timeout=240)
    torchrun("stop.py", str(two), reason)
    alone, *both = (json.loads((file).read_text()) for file in (one / "rank0.json", two / "rank0.json", two / "rank1.json"))
    assert alone["type"] == "NO" and {rank["type"] for rank in both} == {"MULTI_CPU"}
    for rank in (alone, *both):
        assert rank["depths"] == depths and rank["kept"] == alone["kept"] and rank["blocks"] == depths[-1][1]
    if reason == "latency":  # the clock of the main process is everyone's
        assert both[0]["measured"] == alone["measured"] and both[1]["measured"] == []
    expected, *weights = (torch.load(file) for file in (one / "rank0.pt", two / "rank0.pt", two / "rank1.pt"))
    for name, value in expected.items():
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=1e-5)
