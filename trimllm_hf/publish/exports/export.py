"""`export_model`: converts a folder by a runtime's own tool, and keeps the result only if it computes the same."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from ...loading.new_folder import new_folder
from ...loading.readers import UNTRIED, WRONG, readers_of
from .comparison import Comparison, Reference, prompts_for
from .formats import FORMATS, TOLERANCES, Format
from .tool import Tool, versions_of

logger = logging.get_logger("transformers.trimllm_hf")


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
        raise ValueError(
            f"Expected a folder with a checkpoint, got {source} without a config.json. A model of the Hub is downloaded "
            "first: hf download NAME --local-dir FOLDER."
        )
    config = AutoConfig.from_pretrained(source)
    _refuse_unreadable(source, config, made)
    versions = versions_of(made, quantize, python, to)
    tool = Tool(made, python, {"llama_cpp": str(llama_cpp)} if llama_cpp and to == "gguf" else {})
    tool.check(quantize)
    with new_folder(Path(out)) as unfinished:
        reference, prompts = Reference(source), prompts_for(source, config)
        plain = tool.convert(source, unfinished / "plain", dtype)
        compared = tool.compared(plain, reference, prompts)
        if compared.share > (tolerance := max(TOLERANCES[dtype], TOLERANCES[made.computes_in])):
            raise ValueError(
                f"Expected {made.runtime} to compute what transformers computes, to {tolerance:.1%} of the logits' "
                f"range in {dtype}; but {compared}. Nothing was written."
            )
        kept, quantized = "plain", None
        if quantize is not None:
            kept = "quantized"
            quantized = tool.compared(tool.quantize(source, plain, unfinished / kept, quantize), reference, prompts)
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
    if stock.verdict == WRONG:
        raise ValueError(
            f"Expected a checkpoint that stock {stock.reader} loads, as export tools do, got {folder}: {stock.reason}. "
            "Nothing was written. Drop whole layers, or MLP channels of one width, to export a model."
        )
    for verdict in verdicts:
        if verdict.verdict == WRONG:
            raise ValueError(
                f"Expected a checkpoint that {verdict.reader} reads as transformers 5 does, got {folder}: {verdict.reason}. "
                "Nothing was written. To drop layers so that others read the result, use portable=True, or --portable."
            )
        if verdict.verdict == UNTRIED:
            logger.warning(f"{verdict.reader}: {verdict.reason}. The comparison with transformers decides.")
