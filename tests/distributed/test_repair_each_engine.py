"""Under every engine two processes repair a model as one does: sums over both, and the new weight where it trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
ENGINES = [
    "plain",
    pytest.param("fsdp2", marks=pytest.mark.slow),
    *(pytest.param(f"zero{stage}", marks=[pytest.mark.deepspeed, pytest.mark.slow]) for stage in (1, 2, 3)),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, SCRIPT, folder, "--repair"], check=True, timeout=240)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_repair_as_one(engine: str, torchrun, one_process: Path, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--repair", "--engine", engine)
    one = json.loads((one_process / "rank0.json").read_text())
    (expected,) = one["repairs"]
    assert expected["applied"] and len(expected["repaired"]) >= 1
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        (repair,) = found["repairs"]
        assert repair["applied"] and repair["repaired"] == expected["repaired"]
        assert repair["repaired_loss"] == pytest.approx(expected["repaired_loss"], abs=1e-5)
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
    weights = load_file(tmp_path / "final" / "model.safetensors")
    for name, value in load_file(one_process / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
