"""Under every engine two processes train as one does, while layers are dropped twice; and resume as one does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
TYPES = {"plain": "MULTI_CPU", "fsdp2": "FSDP", **dict.fromkeys(["zero1", "zero2", "zero2_offload", "zero3"], "DEEPSPEED")}
ZERO = [(1, [pytest.mark.slow]), (2, [pytest.mark.slow]), (3, [])]
ENGINES = [pytest.param(name, marks=pytest.mark.deepspeed if "zero" in name else ()) for name in TYPES]


def results(folder: Path) -> list[dict[str, Any]]:
    """What each process saw; a run is judged by its files, since ZeRO-3 may abort at exit, after everything is done."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def one_rank(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rank0.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def check_equal(folder: Path, engine: str, reference: Path, tolerance: float) -> None:
    one = one_rank(reference)
    ranks = [one_rank(folder)] if engine == "one" else results(folder)
    for rank in ranks:
        assert rank["distributed_type"] == TYPES.get(engine, "NO")
        if "zero" in engine:
            assert rank["zero_stage"] == int(engine[4])
        assert rank["kept_layers"] == one["kept_layers"] and len(one["kept_layers"]) == 4
        assert rank["rates"] == pytest.approx(one["rates"][-len(rank["rates"]) :], rel=1e-12)
        assert rank["losses"] == pytest.approx(one["losses"][-len(rank["losses"]) :], abs=tolerance)
    expected = weights(reference)
    mine = weights(folder)
    assert expected.keys() <= mine.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, SCRIPT, folder], check=True, timeout=240)
    result = one_rank(folder)
    assert result["distributed_type"] == "NO" and len(result["losses"]) == 12
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine: str, torchrun, one_process: Path, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine)
    check_equal(tmp_path, engine, one_process, 1e-5)
    for rank in results(tmp_path):
        assert len(rank["losses"]) == 12
        assert rank["alive"] == [0, 0]
        assert rank["unchanged"] == [True, True]  # fp32 parameters and both moments, bit by bit
        before, *after = rank["bytes"]
        for drops, held in enumerate(after, start=1):  # a process held at least its share of weights and both moments
            assert before - held >= drops * rank["block_bytes"] * 3 / 2
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "engine", ["plain", "fsdp2", *(pytest.param(f"zero{n}", marks=[pytest.mark.deepspeed, *slow]) for n, slow in ZERO)]
)
def test_two_processes_choose_as_one(engine: str, torchrun, tmp_path: Path) -> None:
    """By the defaults: sets of blocks are compared while the blocks in them are passed over."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    options = ["--importance", "auto", "--calibration", "16"]
    done = subprocess.run([sys.executable, SCRIPT, one, *options], check=True, timeout=240, text=True, capture_output=True)
    assert "chosen by" in done.stderr and "a lazy scan" in done.stderr
    torchrun("train.py", str(two), "--engine", engine, *options)
    check_equal(two, engine, one, 1e-5)


@pytest.mark.slow
def test_two_replicas_of_two_shards_equal_one(torchrun, one_process: Path, tmp_path: Path) -> None:
    """HSDP: FSDP2 with replicas, four processes."""
    torchrun("train.py", str(tmp_path), "--engine", "hsdp", processes=4)
    one = one_rank(one_process)
    for rank in (json.loads((tmp_path / f"rank{number}.json").read_text()) for number in range(4)):
        assert rank["distributed_type"] == "FSDP" and rank["kept_layers"] == one["kept_layers"]
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert rank["alive"] == [0, 0] and rank["unchanged"] == [True, True]
    for name, value in weights(one_process).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_optimizer_and_scheduler_of_the_deepspeed_config(engine: str, torchrun, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine, "--config_optimizer")
    for rank in results(tmp_path):
        assert rank["unchanged"] == [True, True] and rank["alive"] == [0, 0]
        assert len(set(rank["rates"])) >= 10 and rank["rates"][-1] < 2e-4  # decays on across the drops


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16(engine: str, torchrun, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine, "--bf16")
    for rank in results(tmp_path):
        assert rank["distributed_type"] == TYPES[engine]
        assert rank["unchanged"] == [True, True] and rank["alive"] == [0, 0]
        assert all(0 < loss < 10 for loss in rank["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_one_calibration_example_leaves_a_process_without_a_share(engine: str, torchrun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run([sys.executable, SCRIPT, one, "--calibration", "1"], check=True, timeout=240)
    torchrun("train.py", str(two), "--engine", engine, "--calibration", "1")
    check_equal(two, engine, one, 1e-5)
