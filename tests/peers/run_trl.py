"""TRL's own tests with a `TrimCallback` in every Trainer: which of them fail with it only.

    .venv/bin/python tests/peers/run_trl.py --source ~/trl                    # a checkout of the version that is installed
    .venv/bin/python tests/peers/run_trl.py --source ~/trl --files test_dpo_trainer.py

TRL's source archive has no tests, so that a checkout is needed, and the tests take their tiny models from the Hub. What
fails runs again without the callback. `assumptions.toml` names the tests that assume what a drop changes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from run_peft import HERE, ROOT, assumptions, log_of, results


def run(work: Path, source: Path, mode: str, files: list[str], deadline: float, only: set[str] | None = None) -> None:
    """Run tests with the callback or without, but for those that its log has already."""
    environment = {
        **os.environ,
        "PEERS_MODE": mode,
        "PEERS_LOG": str(log_of(work, mode)),
        "PEERS_DEADLINE": str(deadline),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
    }
    if only is not None:
        (work / "only").write_text("\n".join(sorted(only)))
        environment["PEERS_ONLY"] = str(work / "only")
    options = "-p peers_log -p trl_plugin -p no:cacheprovider -q --no-header --tb=no -W ignore --timeout 300 -o addopts="
    command = [sys.executable, "-m", "pytest", *options.split(), *(f"tests/{name}" for name in files)]
    subprocess.run(command, cwd=source, env=environment, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of TRL")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers" / "trl", help="a folder for logs")
    parser.add_argument("--files", nargs="*", help="files of TRL's tests; by default those of its trainers")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, deadline = arguments.source.resolve(), time.time() + 60 * arguments.minutes
    files = arguments.files or sorted(path.name for path in (source / "tests").glob("test_*trainer*.py"))
    work = arguments.work.resolve()
    run(work, source, "in_memory", files, deadline)
    trimmed = results(work, "in_memory")
    run(work, source, "untrimmed", files, deadline, {name for name, line in trimmed.items() if line["outcome"] == "failed"})
    plain, known = results(work, "untrimmed"), tuple(assumptions("trl"))
    lost = [name for name, line in trimmed.items() if line["outcome"] == "failed"]
    only = [name for name in lost if plain.get(name, {}).get("outcome") == "passed"]
    print(f"{sum(line['trimmed'] > 0 for line in trimmed.values())} trained a model that lost layers, ", end="")
    print(f"{sum(line['trimmed'] > 0 and line['outcome'] == 'passed' for line in trimmed.values())} of them passed")
    print(f"{len(lost)} failed, {len(only)} of them only with the callback:")
    print(*(f"  {name}: {'an assumption' if name.startswith(known) else trimmed[name]['said']}" for name in only), sep="\n")
    return any(not name.startswith(known) for name in only)


if __name__ == "__main__":
    sys.exit(main())
