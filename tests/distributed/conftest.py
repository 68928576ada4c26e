"""Launches a script in several processes on this machine, as a user would."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


def launch_with_torchrun(script: str, *args: str, processes: int = 2, timeout: float = 240) -> str:
    """Runs `scripts/<script>` with torchrun and returns its output; raises with the command and all output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPTS / script), *args]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            failure = f"exit status {code}" if (code := process.wait(timeout)) else None
        except subprocess.TimeoutExpired:
            failure = f"no end after {timeout} s"
        finally:
            # torchrun ends its workers on SIGTERM; on SIGKILL it would leave them running.
            process.terminate()
            process.wait(60)
        out.seek(0)
        output = out.read()
    if failure:
        raise RuntimeError(f"{failure} of: {' '.join(command)}\n{output}")
    return output


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., str]:
    return launch_with_torchrun
