"""Runs go on from a checkpoint: under each engine, mid-epoch and at an epoch's end, in another number of processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_each_engine import ENGINES, SCRIPT, check_equal, one_rank, results, weights
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EXAMPLES = {"mid-epoch": 120, "boundary": 24}  # 8 are set aside, 8 make an optimizer step: 14 steps an epoch, or 2


@pytest.fixture(scope="module")
def saved(torchrun, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run that saved at each second step, made once for each set of arguments."""
    made: dict[tuple[Any, ...], Path] = {}

    def of(engine: str, *arguments: str) -> Path:
        key = (engine, *arguments)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(engine)
            torchrun("train.py", str(made[key]), "--engine", engine, "--save", "2", "--calibration", "8", *arguments)
        return made[key]

    return of


@pytest.mark.parametrize("step", [2, 4, 8], ids=["before", "between", "after"])
@pytest.mark.parametrize("place", EXAMPLES)
@pytest.mark.parametrize("engine", ENGINES)
def test_resume(engine: str, place: str, step: int, torchrun, saved, tmp_path: Path) -> None:
    examples = ("--examples", str(EXAMPLES[place]))
    run = saved(engine, *examples)
    checkpoint = str(run / f"checkpoint-{step}")
    torchrun("train.py", str(tmp_path), "--engine", engine, "--resume", checkpoint, "--calibration", "8", *examples)
    check_equal(tmp_path, engine, run, 1e-6)


def check_alone(folder: Path, run: Path, kind: str) -> None:
    """One process ended where two did."""
    assert one_rank(folder)["distributed_type"] == kind
    expected = weights(run)
    for name, value in weights(folder).items():  # FSDP2 saves tied weights twice
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", [("plain",), ("fsdp2",), ("fsdp2", "--sharded")], ids=" ".join)
def test_resume_in_one_process(arguments: tuple[str, ...], torchrun, saved, tmp_path: Path) -> None:
    run = saved(*arguments)
    again = ("--engine", *arguments, "--resume", str(run / "checkpoint-4"), "--calibration", "8")
    if arguments[0] == "plain":  # under torchrun one process is a DDP of one
        subprocess.run([sys.executable, SCRIPT, tmp_path, *again], check=True, timeout=240)
    else:
        torchrun("train.py", str(tmp_path), *again, processes=1)
    check_alone(tmp_path, run, {"plain": "NO", "fsdp2": "FSDP"}[arguments[0]])


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero_resumes_in_one_process_from_a_universal_checkpoint(engine: str, torchrun, saved, tmp_path: Path) -> None:
    run = saved(engine)
    checkpoint = run / "checkpoint-4"
    again = ("--engine", engine, "--resume", str(checkpoint), "--calibration", "8")
    with pytest.raises(RuntimeError, match=r"got one of 2: ZeRO's partitions do not fit\. Launch 2 processes; or run"):
        torchrun("train.py", str(tmp_path), *again, processes=1)
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", checkpoint / "global_step4", "--output_folder", checkpoint / "global_step4_universal"]
    subprocess.run([*convert, *folders], check=True, timeout=240)
    torchrun("train.py", str(tmp_path), *again, "--universal", processes=1)
    check_alone(tmp_path, run, "DEEPSPEED")


@pytest.mark.deepspeed
@pytest.mark.parametrize("universal", [(), ("--universal",)], ids=["plain", "universal"])
def test_zero3_resumes_in_as_many_processes_only(universal: tuple[str, ...], torchrun, saved, tmp_path: Path) -> None:
    checkpoint = str(saved("zero3") / "checkpoint-4")
    again = ("--engine", "zero3", "--resume", checkpoint, "--calibration", "8", *universal)
    with pytest.raises(RuntimeError, match=r"Launch 2 processes; DeepSpeed cannot read ZeRO-3's"):
        torchrun("train.py", str(tmp_path), *again, processes=1)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)])
def test_the_final_save_is_whole_where_checkpoints_hold_shards(engine: str, torchrun, saved, tmp_path: Path) -> None:
    run = saved(engine, "--sharded")
    assert not list((run / "checkpoint-8").glob("*.safetensors"))
    whole = load_file(run / "final" / "model.safetensors")
    for name, value in weights(saved(engine)).items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-6)
    model, loading = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True)
    assert model.config.num_hidden_layers == 4 and not loading["missing_keys"] and not loading["unexpected_keys"]
    torchrun(
        "train.py",
        str(tmp_path),
        "--engine",
        engine,
        "--sharded",
        "--resume",
        str(run / "checkpoint-4"),
        "--calibration",
        "8",
    )
    check_equal(tmp_path, engine, run, 1e-6)
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize("saves", ["each", "main"])
def test_nodes_that_share_no_disk(saves: str, torchrun, tmp_path: Path) -> None:
    """What a resume needs on each is said at the start; with the weights copied all go on, without them all refuse."""
    torchrun("nodes.py", str(tmp_path), saves)
    for rank in results(tmp_path):
        said = [line for line in rank["said"] if "disks of their own" in line][:1]  # the resumed run says it again
        assert len(said) == 1 and "processes [1] do not see" in said[0] and "Copy the main node's checkpoint" in said[0]
        if saves == "each":
            assert rank["raised"] is None
            assert rank["equal"] and rank["again"] == rank["losses"]
        else:
            assert "got process 0: ['checkpoint-2']; process 1: none." in rank["raised"] and rank["step"] == 0
