"""What every test gets: no network, one thread, nothing leaked to the next test, and a run that really runs."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before any library is imported, and inherited by the processes that a test launches. One thread: sums are then
# added in the same order in a test and in the processes it launches (torchrun gives each of them one thread).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

# Variables that are nobody's leak: pytest sets the first, accelerate and torch the others when first used.
NOT_LEAKS = {"PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}

# The shared data and models lie beside the checkout, not in it.
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", action="store_true", help="fail when no test runs: none selected, or all skipped")


@pytest.hookimpl(tryfirst=True)  # before the terminal reporter writes its summary from the exit status
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--must-run") or reporter is None:  # a worker of pytest-xdist has none, its parent does
        return
    if not any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xpassed", "xfailed")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("\n--must-run: no test was executed, so this run fails", red=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    if item.get_closest_marker("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed, which is not installed: make venv-deepspeed")


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves a process group or a changed environment variable to the next one."""
    before = dict(os.environ)
    yield
    leaks = []
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.destroy_process_group()
        leaks.append("a process group (destroy it, or launch the test's script as a subprocess)")
    for name in sorted({name for name, _ in before.items() ^ os.environ.items()} - NOT_LEAKS):
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
        leaks.append(f"the environment variable {name} (set it with monkeypatch.setenv)")
    if leaks:
        pytest.fail("this test leaves behind: " + "; ".join(leaks), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def collects_only_what_tests_make() -> None:
    """Each drop, and each Trainer at its end, collects garbage: the objects of imported modules, most of all, are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models beside the checkout, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"../shared is not here: {SHARED} is no folder")
    return SHARED
