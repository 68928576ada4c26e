"""The formats that a folder is exported to: by which tool, what it needs, and how exact its numbers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# The largest difference of a logit, as a share of the range of all, that the format's numbers explain.
TOLERANCES = MappingProxyType({"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2})


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        tool: The file in `tools/` that converts and reads.
        runtime: What reads it, for people.
        reader: Its beginning in the table of readers; None where the graph is traced from transformers' own model.
        packages: Its modules, and the packages that have them.
        for_quantizing: The same, besides, where it is quantized.
        dtype: The numbers that are written, if none are named.
        computes_in: The coarsest numbers that the runtime itself uses, whatever is written.
        log_probabilities: Whether its tool reads these in place of logits.
        quantized: What it can be quantized to.
        settings: What the tool has to be told.
    """

    tool: str
    runtime: str
    reader: str | None
    packages: dict[str, str]
    dtype: str = "float32"
    computes_in: str = "float32"
    log_probabilities: bool = False
    quantized: tuple[str, ...] = ("int8",)
    for_quantizing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


_EXPORTERS = {"transformers.exporters": "transformers>=5.24"}
FORMATS = MappingProxyType({
    "gguf": Format(
        tool="with_llama_cpp",
        runtime="llama.cpp",
        reader="llama.cpp",
        packages={"xllamacpp": "xllamacpp", "sentencepiece": "sentencepiece", "transformers": "transformers"},
        dtype="float16",
        computes_in="float16",
        log_probabilities=True,
        quantized=("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"),
    ),
    "onnx": Format(
        tool="with_transformers",
        runtime="ONNX Runtime",
        reader=None,
        packages={**_EXPORTERS, "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
        settings={"to": "onnx"},
    ),
    "openvino": Format(
        tool="with_transformers",
        runtime="OpenVINO",
        reader=None,
        packages={**_EXPORTERS, "openvino": "openvino"},
        for_quantizing={"nncf": "nncf"},
        settings={"to": "openvino"},
    ),
    "mlx": Format(
        tool="with_mlx_lm",
        runtime="mlx-lm",
        reader="mlx-lm",
        packages={"mlx_lm": "mlx-lm", "mlx": "mlx[cpu] (on a Mac: mlx)"},
        quantized=("int8", "int4"),
    ),
    "ctranslate2": Format(
        tool="with_ctranslate2",
        runtime="CTranslate2",
        reader="CTranslate2",
        packages={"ctranslate2": "ctranslate2", "transformers": "transformers"},
        quantized=("int8", "int16"),
    ),
})  # fmt: skip
