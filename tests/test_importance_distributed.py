"""Two processes with shares of different size score as one process does, and gather each block once a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from importance_models import by_dropping, by_dropping_halves, make_batches, make_model

from trimllm_hf import score_layers

HERE = Path(__file__).parent
LLAMA = "LlamaForCausalLM:5"
CASES = {
    "ddp": ["sensitivity", "perplexity", "activation_norm", "angular", "taylor"],
    "fsdp2": ["sensitivity", "block_influence", "angular", "taylor"],
    "zero3": ["sensitivity", "relative_magnitude"],
}
ARCHITECTURES = [
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM"),
    *("CohereForCausalLM", "Olmo2ForCausalLM", "MixtralForCausalLM"),
]
ENGINES = ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)]


def score(engine: str, folder: Path, cases: list[str]) -> dict[str, Any]:
    """What both processes found in each case."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    script = [str(HERE / "run_importance_scan.py"), engine, str(folder), *cases]
    command = [*launch, "--rdzv-endpoint=localhost:0", *script]
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=500)
    # judged by its files: ZeRO-3 may abort at exit, after everything is done
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), f"{command}\n{run.stdout}\n{run.stderr}"
    one, other = (json.loads(file.read_text()) for file in files)
    assert one == other and list(one) == cases
    found: dict[str, Any] = one
    return found


def check(case: str, found: dict[str, Any], engine: str) -> None:
    architecture, layers, unit, importance = case.split(":")
    model = make_model(architecture, num_hidden_layers=int(layers))
    batches = make_batches(model, ((3, 9), (2, 7), (4, 5)))
    scores = torch.tensor(found["scores"], dtype=torch.float64)
    if importance != "sensitivity":
        expected = score_layers(model, batches, importance, unit)
    elif unit == "block":
        expected = by_dropping(model, batches)
    else:
        plain = by_dropping_halves(model, batches)
        scores, expected = scores[list(plain)], torch.tensor(list(plain.values()), dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-5 if importance == "taylor" else 1e-6, atol=1e-6)
    if engine != "ddp" and importance == "sensitivity":
        # two batches each (the second process goes through its only one again), and one pass that checks the first sweep
        assert found["blocks"] == [3] * int(layers)
        # embedding and head: that pass, and for each batch one that sees shapes, the sweep, and once for all outputs; ZeRO-3
        # gathers a table that both share at either end of that pass and of the sweep
        tied = engine == "zero3" and model.config.tie_word_embeddings
        assert found["rest"] == 1 + tied + 2 * (3 + tied)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_score_as_one(engine: str, tmp_path: Path) -> None:
    # after other scores the sweep still gathers no block twice
    units = [("block", name) for name in CASES[engine]] + [("sublayer", "sensitivity")]
    cases = [f"{LLAMA}:{unit}:{importance}" for unit, importance in units]
    for case, found in score(engine, tmp_path, cases).items():
        check(case, found, engine)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_so_do_they_with_every_architecture(engine: str, tmp_path: Path) -> None:
    units = ("block", "sublayer")
    cases = [f"{architecture}:3:{unit}:sensitivity" for architecture in ARCHITECTURES for unit in units]
    for case, found in score(engine, tmp_path, cases).items():
        check(case, found, engine)
