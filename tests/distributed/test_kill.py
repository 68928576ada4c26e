"""SIGKILL at any moment: no complete checkpoint is lost, a half-written one is not resumed from, the end is the same."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_each_engine import TYPES, check_equal

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
MOMENTS = ["drop:0", "drop:1", "model:4", "state:8"]
ENGINES = ["one", *TYPES]
SEED = 20


def kills() -> list:
    """Each engine: during the drops, during saves, and at a random moment; one process at four random ones."""
    rng = random.Random(SEED)
    found = []
    for engine in ENGINES:
        times = [f"after:{rng.uniform(0.05, 0.6):.2f}" for _ in range(4 if engine == "one" else 1)]
        mark = pytest.mark.deepspeed if "zero" in engine else ()
        chosen = MOMENTS if engine in ("one", "plain", "zero3") else rng.sample(MOMENTS, 2)
        found += [pytest.param(engine, moment, marks=mark, id=f"{engine}-{moment}") for moment in (*chosen, *times)]
    return found


def launch(torchrun, engine: str, folder: Path, *arguments: str) -> None:
    if engine == "one":
        subprocess.run([sys.executable, SCRIPT, folder, *arguments], check=True, timeout=240, capture_output=True)
    else:
        torchrun("train.py", str(folder), "--engine", engine, *arguments)


@pytest.fixture(scope="module")
def uninterrupted(torchrun, tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine)
            launch(torchrun, engine, made[engine], "--save", "2", "--calibration", "8")
        return made[engine]

    return of


def test_at_least_twenty_kills() -> None:
    assert len(kills()) >= 20


@pytest.mark.parametrize(("engine", "moment"), kills())
def test_a_killed_run_ends_as_if_it_had_not_been(engine: str, moment: str, torchrun, uninterrupted, tmp_path: Path) -> None:
    expected = uninterrupted(engine)
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        launch(torchrun, engine, tmp_path, "--save", "2", "--calibration", "8", "--kill", moment)
    assert not (tmp_path / "rank0.json").exists()
    launch(torchrun, engine, tmp_path, "--save", "2", "--calibration", "8", "--resume", "last")
    check_equal(tmp_path, engine, expected, 0 if engine == "one" else 1e-6)
