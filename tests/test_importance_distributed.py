"""Two processes with shares of different size score as one process does, and gather each block once a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from importance_models import by_dropping, make_batches, make_model

HERE = Path(__file__).parent


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_score_as_one(engine: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    script = [str(HERE / "run_importance_scan.py"), engine, str(tmp_path)]
    command = [*launch, "--rdzv-endpoint=localhost:0", *script]
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{command}\n{run.stderr}"
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["scores"] == results[1]["scores"]
    model = make_model("LlamaForCausalLM")
    expected = by_dropping(model, make_batches(model, ((3, 9), (2, 7), (4, 5))))
    scores = torch.tensor(results[0]["scores"], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    if engine == "fsdp2":
        # two batches each (the second process goes through its only one again), and one pass that checks the first sweep
        assert results[0]["gathers"] == results[1]["gathers"] == [3] * 5
