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

from trimllm_hf import score_layers

HERE = Path(__file__).parent
IMPORTANCES = {
    "ddp": ["sensitivity", "perplexity", "activation_norm", "angular", "taylor"],
    "fsdp2": ["sensitivity", "block_influence", "angular", "taylor"],
    "zero3": ["sensitivity", "relative_magnitude", "sensitivity"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)])
def test_two_processes_score_as_one(engine: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    script = [str(HERE / "run_importance_scan.py"), engine, str(tmp_path), ",".join(IMPORTANCES[engine])]
    command = [*launch, "--rdzv-endpoint=localhost:0", *script]
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    # judged by its files: ZeRO-3 may abort at exit, after everything is done
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), f"{command}\n{run.stdout}\n{run.stderr}"
    results = [json.loads(file.read_text()) for file in files]
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model, ((3, 9), (2, 7), (4, 5)))
    assert results[0] == results[1]
    for importance, result in results[0].items():
        expected = by_dropping(model, batches) if importance == "sensitivity" else score_layers(model, batches, importance)
        scores = torch.tensor(result["scores"], dtype=torch.float64)
        torch.testing.assert_close(scores, expected, rtol=1e-5 if importance == "taylor" else 1e-6, atol=1e-6)
    if engine != "ddp":
        # two batches each (the second process goes through its only one again), and one pass that checks the first sweep
        assert results[0]["sensitivity"]["blocks"] == [3] * 5
        # embedding and head: that pass, and for each batch one that sees shapes, the sweep, and once for all outputs
        assert results[0]["sensitivity"]["rest"] == 1 + 2 * 3
