"""The launcher that the distributed tests stand on: it runs all ranks, and a rank that fails or hangs is an error."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.distributed


def test_all_ranks_run(torchrun) -> None:
    output = torchrun("all_reduce.py")
    for rank in range(2):
        assert f"rank {rank} of 2: total 3, 1 thread" in output


def test_a_failing_rank_is_an_error_that_says_what_was_run(torchrun) -> None:
    with pytest.raises(RuntimeError, match=r"exit status 1 of: .*all_reduce.py --fail[\s\S]*rank 1 was told to fail"):
        torchrun("all_reduce.py", "--fail")


def test_a_hanging_rank_is_an_error(torchrun) -> None:
    with pytest.raises(RuntimeError, match=r"no end after 8 s of: .*all_reduce.py --hang"):
        torchrun("all_reduce.py", "--hang", timeout=8)


@pytest.mark.deepspeed
def test_deepspeed_imports_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    code = "import deepspeed; print('accelerator', deepspeed.accelerator.get_accelerator().device_name())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "accelerator cpu" in result.stdout, result.stderr
