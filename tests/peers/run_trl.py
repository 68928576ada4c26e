"""TRL's own tests with a `TrimCallback` in every Trainer: which of them fail with it only.

    .venv/bin/python tests/peers/run_trl.py                                   # of the last release that has its tests
    .venv/bin/python tests/peers/run_trl.py --source ~/trl                    # a checkout of the version that is installed
    .venv/bin/python tests/peers/run_trl.py --files test_dpo_trainer.py --minutes 30

The source archives of TRL after 0.23.1 have no tests. Without a checkout, that release is downloaded and its trainers are
tested, with tiny models and data that are made here; a checkout's tests take theirs from the Hub. What fails runs again
without the callback. `assumptions.toml` names the tests that assume what a drop changes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from run_peft import HERE, ROOT, assumptions, results, run

RELEASE = "0.23.1"
MODES = ("in_memory", "untrimmed")


def prepare(work: Path) -> Path:
    """The source of a release with its package, models and data beside it; made when they are not there."""
    source = work / f"trl-{RELEASE}"
    pip = [sys.executable, "-m", "pip"]
    if not source.is_dir():
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(work)]
        subprocess.run([*pip, "download", "--quiet", *options, f"trl=={RELEASE}"], check=True)
        with tarfile.open(work / f"trl-{RELEASE}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    if not (work / "site").is_dir():
        target = ["--quiet", "--no-deps", "--target", str(work / "site"), f"trl=={RELEASE}", "parameterized"]
        subprocess.run([*pip, "install", *target], check=True)
    (source / "tests" / "__init__.py").touch()
    if not (work / "data").is_dir():
        subprocess.run([sys.executable, "-W", "ignore", str(HERE / "trl_models.py"), str(work), str(source)], check=True)
    return source


def table(work: Path) -> tuple[list[str], list[str]]:
    """What came of the tests, in lines, and what fails with the callback only and is not among the assumptions."""
    trimmed, plain = (results(work, mode) for mode in MODES)
    known = tuple(assumptions("trl"))
    lost = [name for name, line in trimmed.items() if line["outcome"] == "failed"]
    only = [name for name in lost if plain.get(name, {}).get("outcome") == "passed"]
    ran = [line for line in trimmed.values() if line["trimmed"]]
    lines = [
        f"{len(ran)} trained a model that lost layers, {sum(line['outcome'] == 'passed' for line in ran)} of them passed",
        f"{len(lost)} failed, {len(only)} of them only with the callback:",
        *(f"  {name}: {'an assumption' if name.startswith(known) else trimmed[name]['said']}" for name in only),
    ]
    return lines, [name for name in only if not name.startswith(known)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help=f"a checkout of TRL; by default the archive of {RELEASE}")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "peers" / "trl", help="a folder for sources, models and logs"
    )
    parser.add_argument("--files", nargs="*", help="files of TRL's tests; by default those of its trainers")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    settings = {"PEERS_DEADLINE": str(time.time() + 60 * arguments.minutes)}
    if arguments.source is None:
        source = prepare(work)
        settings |= {"HF_HUB_CACHE": str(work / "cache"), "TRL_DATA": str(work / "data"), "PYTHONPATH": str(work / "site")}
    else:
        source = arguments.source.resolve()
        settings["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
    files = arguments.files or sorted(path.name for path in (source / "tests").glob("test_*trainer*.py"))
    run(work, source, "trl_plugin", " ".join(MODES), files, ["--timeout", "600"], **settings)
    lines, only = table(work)
    print(*lines, sep="\n")
    return bool(only)


if __name__ == "__main__":
    sys.exit(main())
