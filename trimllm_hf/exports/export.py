"""`export_model`: converts a folder by a runtime's own tool, and keeps the result only if it computes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from ..loading.new_folder import new_folder
from ..loading.readers import UNTRIED, WRONG, readers_of
from .comparison import NEW_TOKENS, Comparison, Reference, compare, prompts_for
from .formats import FORMATS, TOLERANCES, Format

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


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from transformers.

    Attributes:
        folder: Where it lies.
        to: Its format.
        dtype: Its numbers before quantizing.
        quantize: What it was quantized to, or None.
        bytes: Of all its files.
        versions: Of the packages that converted and read it.
        comparison: Of the export before quantizing.
        quantized: Of the export as it was written, where it was quantized; this difference is the quantizer's.
    """

    folder: str
    to: str
    dtype: str
    quantize: str | None
    bytes: int
    versions: dict[str, str]
    comparison: Comparison
    quantized: Comparison | None


def export_model(
    folder: str | Path,
    to: str,
    out: str | Path,
    quantize: str | None = None,
    dtype: str | None = None,
    python: str | Path | None = None,
    llama_cpp: str | Path | None = None,
) -> Export:
    """Convert a checkpoint to another runtime's format, and compare what that runtime computes with transformers.

    Logits along a few prompts and a greedy continuation, read with the runtime's own cache, must be those of transformers
    but for what the numbers' precision explains; else nothing stays. Where it is quantized, the export is compared before
    that, and how far quantizing takes it is said.

    Args:
        folder: A checkpoint of a causal language model.
        to: "gguf", "onnx", "openvino", "mlx" or "ctranslate2".
        out: Folder to write, new or empty.
        quantize: What the format's own quantizer makes of it, such as "Q4_K_M" or "int8"; None leaves it.
        dtype: "float32", "float16" or "bfloat16"; by default what `formats.py` says of the format.
        python: An interpreter that has the tools; by default this one.
        llama_cpp: A folder of llama.cpp with its converter, for "gguf".

    Raises:
        ValueError: If the runtime would take it for another model, lacks something, fails, or computes another function.
            Nothing is written then.
        OSError: If the folder cannot be written.
    """
    source, python = Path(folder), str(python or sys.executable)
    if to not in FORMATS:
        raise ValueError(f"Expected one of {', '.join(FORMATS)} to export to, got {to!r}.")
    made = FORMATS[to]
    if quantize is not None:
        known = {name.lower(): name for name in made.quantized}
        if quantize.lower() not in known:
            raise ValueError(f"Expected one of {', '.join(made.quantized)} to quantize {to} to, got {quantize!r}.")
        quantize = known[quantize.lower()]
    dtype = dtype or made.dtype
    if dtype not in TOLERANCES:
        raise ValueError(f"Expected one of {', '.join(TOLERANCES)} as dtype, got {dtype!r}.")
    if not (source / "config.json").is_file():
        raise ValueError(f"Expected a folder with a checkpoint, got {source}, which has no config.json.")
    config = AutoConfig.from_pretrained(source)
    _refuse_unreadable(source, config, made)
    versions = _versions(made, quantize, python, to)
    settings = {**made.settings, **({"llama_cpp": str(llama_cpp)} if llama_cpp and to == "gguf" else {})}
    with new_folder(Path(out)) as unfinished:
        reference, prompts = Reference(source), prompts_for(source, config)
        tool = _Tool(made, python, settings, unfinished)
        compared = tool.compared(tool.convert(source, "plain", dtype, None), reference, prompts)
        tolerance = max(TOLERANCES[dtype], TOLERANCES[made.computes_in])
        if compared.share > tolerance:
            raise ValueError(
                f"Expected {made.runtime} to compute what transformers computes, to {tolerance:.1%} of the logits' "
                f"range in {dtype}; but {compared}. Nothing was written."
            )
        kept, quantized = "plain", None
        if quantize is not None:
            kept = "quantized"
            quantized = tool.compared(tool.convert(source, kept, dtype, quantize), reference, prompts)
        for path in (unfinished / kept).iterdir():
            path.rename(unfinished / path.name)
        for name in {"plain", kept}:
            shutil.rmtree(unfinished / name)
        size = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    return Export(str(out), to, dtype, quantize, size, versions, compared, quantized)


def _refuse_unreadable(folder: Path, config: PreTrainedConfig, made: Format) -> None:
    """Refuse what the table of readers knows to be read as another model.

    Raises:
        ValueError: If it is.
    """
    stock, *others = readers_of(config)
    verdicts = [each for each in others if made.reader is not None and each.reader.startswith(made.reader)]
    for verdict in (stock, *verdicts):
        if verdict.verdict == WRONG:
            raise ValueError(
                f"Expected a checkpoint that {verdict.reader} reads as transformers 5 does, got {folder}: {verdict.reason}. "
                "Nothing was written. To drop layers so that others read the result, use portable=True, or --portable."
            )
        if verdict.verdict == UNTRIED:
            logger.warning(f"{verdict.reader}: {verdict.reason}. The comparison with transformers decides.")


def _versions(made: Format, quantize: str | None, python: str, to: str) -> dict[str, str]:
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


class _Tool:
    """A tool in its interpreter, and the folder that it works in."""

    def __init__(self, made: Format, python: str, settings: dict[str, Any], folder: Path) -> None:
        self.made, self.python, self.settings, self.folder = made, python, settings, folder

    def convert(self, source: Path, name: str, dtype: str, quantize: str | None) -> Path:
        """Convert into a folder of this name.

        Raises:
            ValueError: If the converter fails.
        """
        out = self.folder / name
        out.mkdir()
        settings = {**self.settings, "dtype": dtype, "quantize": quantize}
        self._run(f"convert to {quantize or dtype}", "convert", str(source), str(out), json.dumps(settings))
        return out

    def compared(self, out: Path, reference: Reference, prompts: list[list[int]]) -> Comparison:
        """What the runtime answers, beside transformers.

        Raises:
            ValueError: If the runtime fails.
        """
        asked, result = self.folder / "prompts.json", self.folder / "answers.npz"
        asked.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}), encoding="utf-8")
        settings = {name: value for name, value in self.settings.items() if name == "to"}
        self._run("read what was converted", "read", str(out), str(asked), str(result), json.dumps(settings))
        with np.load(result) as found:
            answers = [(found[f"tokens{n}"].tolist(), found[f"logits{n}"]) for n in range(len(prompts))]
        asked.unlink()
        result.unlink()
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
