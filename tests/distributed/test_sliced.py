"""A sliced model trains like any other: two processes equal one under each engine, and a killed run goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sliced import calibration, model_to_slice
from test_each_engine import TYPES
from tiny import tokens
from transformers import AutoModelForCausalLM

from trimllm_hf import SliceMap, slice_model

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "scripts" / "train_sliced.py"
ENGINES = ["plain", pytest.param("zero2", marks=pytest.mark.deepspeed), pytest.param("fsdp2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = model_to_slice()
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    folder = tmp_path_factory.mktemp("sliced")
    model.save_pretrained(folder)
    return folder


def run_one(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=check, timeout=240, capture_output=True, text=True)


@pytest.fixture(scope="module")
def one_process(sliced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_one(sliced, folder)
    return folder


def losses(folder: Path, rank: int = 0) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"rank{rank}.json").read_text())["losses"]
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine: str, torchrun, sliced: Path, one_process: Path, tmp_path: Path) -> None:
    torchrun("train_sliced.py", str(sliced), str(tmp_path), "--engine", engine)
    assert json.loads((tmp_path / "rank1.json").read_text())["distributed_type"] == TYPES[engine]
    expected = losses(one_process)
    assert len(expected) == 8
    start = load_file(sliced / "model.safetensors")
    assert all((start[name] - value).abs().max() > 1e-4 for name, value in weights(one_process).items() if value.dim() > 1)
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert weights(tmp_path).keys() == weights(one_process).keys()
    for name, value in weights(one_process).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=1e-5)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert SliceMap.from_config(final.config) == SliceMap.from_config(AutoModelForCausalLM.from_pretrained(sliced).config)
    cached = final.generate(tokens(), max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, final.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_killed_run_ends_as_if_it_had_not_been(sliced: Path, one_process: Path, tmp_path: Path) -> None:
    assert run_one(sliced, tmp_path, "--kill", 5, check=False).returncode != 0
    assert not (tmp_path / "rank0.json").exists()
    run_one(sliced, tmp_path, "--resume")
    assert losses(tmp_path) == {step: loss for step, loss in losses(one_process).items() if int(step) > 4}
    for name, value in weights(one_process).items():
        assert torch.equal(weights(tmp_path)[name], value)
