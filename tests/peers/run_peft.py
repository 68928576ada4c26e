"""PEFT's own tests on trimmed models: which of them pass, and which fail on trimmed models only.

    make test-peers                                                  # everything: hours
    .venv/bin/python tests/peers/run_peft.py --share 0.1             # a tenth of it
    .venv/bin/python tests/peers/run_peft.py --minutes 30            # goes on where it stopped
    .venv/bin/python tests/peers/run_peft.py --files test_auto.py    # some files

PEFT's tests come with the source archive of the version that is installed, which pip downloads. They run on tiny models
that lost layers in memory, and those that loaded such a model and passed run again on ones that were saved and reloaded.
What fails runs once more on models that were never trimmed. The order is such that any part stands for all.
`docs/readers.md` shows a table; `assumptions.toml` names the tests that assume what a drop changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What its tests import, with what these import in turn.
LIBRARIES = """
    diffusers parameterized scipy scikit-learn joblib threadpoolctl cloudpickle narwhals
""".split()
MODES = ("in_memory", "reloaded", "untrimmed")
# Those that load a model of the Hub and need neither a GPU, pictures, nor a library that the tests of this project lack.
FILES = """
    test_adaption_prompt.py test_arrow.py test_auto.py test_boft.py test_cartridge.py test_config.py test_cpt.py
    test_decoder_models.py test_encoder_decoder_models.py test_feature_extraction_models.py test_helpers.py
    test_initialization.py test_lora_conversion.py test_lora_intruders.py test_lora_variants.py test_low_level_api.py
    test_mixed.py test_multitask_prompt_tuning.py test_other.py test_poly.py test_seq_classifier.py test_shadow.py
    test_supertuning.py test_target_parameters.py test_token_classification_qa.py test_trainable_tokens.py
    test_tuners_utils.py test_xlora.py
""".split()


def prepare(work: Path) -> None:
    """PEFT's tests in a folder, and the caches of models beside it; made when they are not there."""
    release = version("peft")
    source = work / f"peft-{release}"
    if not source.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(work)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, f"peft=={release}"], check=True)
        with tarfile.open(work / f"peft-{release}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    (source / "tests" / "__init__.py").touch()
    if not (work / "site").is_dir():  # what its tests import and need not have: they are not run with it
        target = ["--quiet", "--no-deps", "--target", str(work / "site"), *LIBRARIES]
        subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True)
    if not (work / "cache" / "made").is_file():
        subprocess.run([sys.executable, "-W", "ignore", str(HERE / "peft_models.py"), str(work / "cache")], check=True)
        (work / "cache" / "made").touch()


def run(work: Path, source: Path, plugin: str, modes: str, files: list[str], options: list[str], **more: str) -> None:
    """Run tests of a peer's in some modes, without those that the logs in a folder have already."""
    environment = {
        **os.environ,
        "PEERS_MODES": modes,
        "PEERS_LOGS": str(work),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), more.get("PYTHONPATH", "")]),
    }
    plugins = ["-p", "peers_log", "-p", plugin, "-p", "no:cacheprovider"]
    shown = ["-q", "--no-header", "--tb=no", "-W", "ignore", "--continue-on-collection-errors", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *plugins, *shown, *options, *(f"tests/{name}" for name in files)]
    subprocess.run(command, cwd=source, env=environment, check=False)


def number_of(name: str) -> int:
    """A number below 16**8 that stands for a test's name, always the same."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16)


def group_of(name: str) -> tuple[str, str]:
    """The file and the tuner of a test, by its name; without a tuner, the file and the function."""
    path, _, test = name.partition("::")
    function, _, parameters = test.partition("[")
    tuner = re.search(r"(\w+)Config\b", parameters)
    return path.removeprefix("tests/"), tuner[1] if tuner else function


def in_rounds(names: Iterable[str]) -> list[str]:
    """Tests in rounds that have one of every file and tuner that is left, so that the beginning stands for all."""
    seen: Counter[tuple[str, str]] = Counter()
    rounds = []
    for name in sorted(names, key=lambda name: (number_of(name), name)):
        rounds.append((seen[group_of(name)], number_of(name), name))
        seen[group_of(name)] += 1
    return [name for *_, name in sorted(rounds)]


def log_of(work: Path, mode: str) -> Path:
    return work / f"{mode}.jsonl"


def results(work: Path, mode: str) -> dict[str, dict[str, Any]]:
    """The last line of each test's, by its name."""
    log = log_of(work, mode)
    lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else []
    return {line["id"]: line for line in lines}


def assumptions(peer: str) -> dict[str, str]:
    """By the beginning of a test's name, what it assumes that a drop changes."""
    found: dict[str, str] = tomllib.loads((HERE / "assumptions.toml").read_text())[peer]
    return found


def table(work: Path) -> tuple[list[str], list[str]]:
    """The rows of a table by file, and what fails on trimmed models only and is not among the assumptions."""
    known = tuple(assumptions("peft"))
    modes = {mode: results(work, mode) for mode in MODES}
    counts: dict[str, Counter[str]] = {}
    only_trimmed = []
    for name, line in modes["in_memory"].items():
        if not line["trimmed"] or line["outcome"] == "skipped":
            continue
        count = counts.setdefault(name.removeprefix("tests/").partition("::")[0], Counter())
        count["loaded"] += 1
        found = {mode: line_of[name]["outcome"] for mode, line_of in modes.items() if name in line_of}
        count["in_memory"] += found["in_memory"] == "passed"
        count["reloaded"] += found.get("reloaded") == "passed"
        count["both"] += found["in_memory"] == found.get("reloaded") == "passed"
        if "failed" in (found["in_memory"], found.get("reloaded")) and "untrimmed" in found:
            if found["untrimmed"] != "passed":
                count["untrimmed too"] += 1
            elif name.startswith(known):
                count["assumed"] += 1
            else:
                count["only"] += 1
                lost = line if found["in_memory"] == "failed" else modes["reloaded"][name]
                only_trimmed.append(f"{name}: {lost['said']}")
    total = sum(counts.values(), Counter())
    columns = ("loaded", "in_memory", "reloaded", "both", "untrimmed too", "assumed", "only")
    head = ["tests of", "loaded a trimmed model", "passed trimmed in memory", "passed reloaded", "passed both",
            "failed untrimmed too", "failed by an assumption", "failed only trimmed"]  # fmt: skip
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    rows += [
        f"| {name} | {' | '.join(str(count[column]) for column in columns)} |"
        for name, count in (*sorted(counts.items()), ("all", total))
    ]
    return rows, only_trimmed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="a folder for sources, models and logs")
    parser.add_argument("--files", nargs="*", default=FILES, help="files of PEFT's tests")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    parser.add_argument("--share", type=float, default=1.0, help="of the tests that are left, so many, always the same")
    parser.add_argument("--table", action="store_true", help="run nothing: print what has been found so far")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if not arguments.table:
        prepare(work)
        source = work / f"peft-{version('peft')}"
        settings = {
            "PEERS_DEADLINE": str(time.time() + 60 * arguments.minutes),
            "PEERS_SHARE": str(arguments.share),
            "HF_HUB_CACHE": str(work / "cache" / "current"),  # a link, to that of a mode
            "PYTHONPATH": os.pathsep.join([str(source), str(work / "site")]),
        }
        run(work, source, "peft_plugin", " ".join(MODES), arguments.files, ["--timeout", "600"], **settings)
    rows, only_trimmed = table(work)
    print("\n".join(rows))
    print(*(f"only trimmed: {each}" for each in only_trimmed), sep="\n")
    return bool(only_trimmed)


if __name__ == "__main__":
    sys.exit(main())
