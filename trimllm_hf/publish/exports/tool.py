"""A tool in the interpreter that has it, which may be another than this one: what is there, and what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .comparison import NEW_TOKENS, Comparison, Reference, compare
from .formats import Format

logger = logging.get_logger("transformers.trimllm_hf")

_RUN = Path(__file__).parent / "tools" / "run.py"
_ASK = """
import importlib.metadata as m, importlib.util as u, json, sys
def found(name):
    try: return u.find_spec(name) is not None
    except ModuleNotFoundError: return False
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
modules, packages = json.loads(sys.argv[1])
print(json.dumps([[name for name in modules if not found(name)], {name: version(name) for name in packages}]))
"""


def versions_of(made: Format, quantize: str | None, python: str, to: str) -> dict[str, str]:
    """The versions of what a format needs, in an interpreter.

    Raises:
        ValueError: If it lacks some, or there is no such interpreter.
    """
    needed = {**made.packages, **(made.for_quantizing if quantize else {})}
    names = {module: package.split("[")[0].split(">")[0] for module, package in needed.items()}
    asked = json.dumps([list(needed), sorted({*names.values(), "torch"})])
    try:
        done = subprocess.run([python, "-c", _ASK, asked], capture_output=True, text=True, env=_environment(python))
    except OSError as error:
        raise ValueError(f"Expected a Python interpreter, got {python} ({error.strerror}).") from None
    if done.returncode != 0:
        raise ValueError(f"Expected a Python interpreter, got {python}: {_last(done.stderr)}")
    missing, versions = json.loads(done.stdout.splitlines()[-1])
    if missing:
        packages = ", ".join(sorted({needed[name] for name in missing}))
        raise ValueError(
            f"Expected {packages} in {python} to export to {to}, got none. Install it there (pip install "
            "'trimllm_hf[runtimes]' has all of them), or name an interpreter that has it by --python."
        )
    return {name: version for name, version in versions.items() if version}


class Tool:
    """A tool in its interpreter.

    Args:
        made: The format.
        python: The interpreter.
        settings: What the converter has to be told besides.
    """

    def __init__(self, made: Format, python: str, settings: dict[str, Any]) -> None:
        self.made, self.python, self.settings = made, python, settings

    def check(self, kind: str | None) -> None:
        """Ask for the programs that converting and quantizing need.

        Raises:
            ValueError: If one is missing.
        """
        self._run("be complete", "check", json.dumps({**self.settings, "kind": kind}))

    def convert(self, source: Path, out: Path, dtype: str) -> Path:
        """Convert a folder into a new one.

        Raises:
            ValueError: If the converter fails.
        """
        out.mkdir()
        settings = {**self.made.settings, **self.settings, "dtype": dtype}
        self._run(f"convert to {dtype}", "convert", str(source), str(out), json.dumps(settings))
        return out

    def quantize(self, source: Path, plain: Path, out: Path, kind: str) -> Path:
        """Make a quantized one in a new folder, of what was converted, or again of its source.

        Raises:
            ValueError: If the quantizer fails.
        """
        out.mkdir()
        settings = json.dumps({**self.made.settings, **self.settings, "kind": kind})
        self._run(f"quantize to {kind}", "quantize", str(source), str(plain), str(out), settings)
        return out

    def compared(self, out: Path, reference: Reference, prompts: list[list[int]]) -> Comparison:
        """What the runtime answers, beside transformers.

        Raises:
            ValueError: If the runtime fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            asked, result = Path(folder) / "prompts.json", Path(folder) / "answers.npz"
            asked.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}), encoding="utf-8")
            settings = json.dumps(self.made.settings)
            self._run("read what was written", "read", str(out), str(asked), str(result), settings)
            with np.load(result) as found:
                answers = [(found[f"tokens{n}"].tolist(), found[f"logits{n}"]) for n in range(len(prompts))]
        return compare(reference, prompts, answers, self.made.log_probabilities)

    def _run(self, what: str, *arguments: str) -> None:
        logger.info(f"{self.made.runtime}: {what}.")
        command = [self.python, str(_RUN), self.made.tool, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(self.python), errors="replace")
        if done.returncode != 0:
            raise ValueError(f"Expected {self.made.runtime} to {what}, got: {_last(done.stderr or done.stdout)}")


def _environment(python: str) -> dict[str, str]:
    """This process's environment; another interpreter does not get the modules of this one."""
    ours = python == sys.executable
    return {name: value for name, value in os.environ.items() if ours or name not in ("PYTHONPATH", "PYTHONHOME")}


def _last(text: str, lines: int = 3) -> str:
    said = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(said[-lines:]) or "no word"
