"""ONNX and OpenVINO: transformers' own exporters, with a cache so that decoding is real; their runtimes read."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# From the ids of a prompt and a number: so many tokens, greedily, and the logits that each is chosen from.
Answer = Callable[[Sequence[int], int], tuple[list[int], list[Any]]]


def convert(folder: Path, out: Path, to: str, dtype: str = "float32") -> None:
    """Write one graph that takes tokens and a cache, and what transformers needs to load it again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.exporters.utils import decompose_for_generation

    exporters: Any = importlib.import_module("transformers.exporters")  # experimental, and without types
    named = ("OnnxExporter", "OnnxConfig") if to == "onnx" else ("OpenVINOExporter", "OpenVINOConfig")
    exporter, config = (getattr(exporters, name) for name in named)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens = torch.arange(2 * 8).reshape(2, 8) % model.config.get_text_config().vocab_size
    sample = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        # The pass of many tokens after a cache; the cache may be empty, so that it is the prompt's pass as well.
        _, step = decompose_for_generation(model, sample, multi_token_decode=True)["decode"]
        exporter().export(model, step, config(dynamic=True)).save_pretrained(out)
    model.generation_config.save_pretrained(out)
    if any(folder.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def quantize(folder: Path, converted: Path, out: Path, kind: str, to: str) -> None:
    """Weights in int8: by ONNX Runtime, which then quantizes activations as it goes, or by NNCF, weights alone."""
    shutil.copytree(converted, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx*", "*.xml", "*.bin"))
    if to == "onnx":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(converted / "model.onnx", out / "model.onnx", per_channel=True, use_external_data_format=True)
        return
    import nncf
    import openvino

    model = openvino.Core().read_model(str(converted / "openvino_model.xml"))
    openvino.save_model(nncf.compress_weights(model), str(out / "openvino_model.xml"), compress_to_fp16=False)


def load(out: Path, to: str, threads: int = 1, ignore_end: bool = False) -> Answer:
    """What answers prompts, greedily, with a cache, beyond an end of text as well."""
    return _onnx(out, threads) if to == "onnx" else _openvino(out, threads)


def _feed(names: Sequence[str], last: Sequence[int], past: int) -> dict[str, Any]:
    """The inputs of one pass that are not the cache, of those that the graph has."""
    import numpy as np

    end = past + len(last)
    known = {
        "input_ids": np.array([last]),
        "attention_mask": np.ones((1, end), dtype=np.int64),
        "position_ids": np.arange(past, end)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    return {name: known[name] for name in names if name in known}


def _greedy(
    step: Callable[[Sequence[int], int], Any], prompt: Sequence[int], new_tokens: int
) -> tuple[list[int], list[Any]]:
    tokens: list[int] = []
    logits: list[Any] = []
    last, past = list(prompt), 0
    while len(tokens) < new_tokens:
        row = step(last, past)
        past += len(last)
        logits.append(row)
        tokens.append(int(row.argmax()))
        last = tokens[-1:]
    return tokens, logits


def _onnx(out: Path, threads: int) -> Answer:
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    # of a sliding window, the tokens seen are a number of the cache
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    names = [given.name for given in session.get_inputs()]
    wanted = [given.name for given in session.get_outputs()]
    # An input of the cache is called as the output that follows it, but for the beginning.
    following = {name: name.replace("input.", "output.", 1) for name in names if "cache" in name}
    caches = [given for given in session.get_inputs() if given.name in following]
    empty = {given.name: np.zeros(_sizes(given.shape), kinds[given.type]) for given in caches}

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        cache = {name: value(zeros) for name, zeros in empty.items()}

        def step(last: Sequence[int], past: int) -> Any:
            feed = {name: value(given) for name, given in _feed(names, last, past).items()}
            got = dict(zip(wanted, session.run_with_ort_values(wanted, {**feed, **cache}), strict=True))
            cache.update({name: got[after] for name, after in following.items()})
            return got["logits"].numpy()[0, -1]

        return _greedy(step, prompt, new_tokens)

    return answer


def _sizes(shape: Sequence[int | str]) -> list[int]:
    """Of an empty cache for one sequence: its batch is 1, what else is free is 0."""
    return [int(size) if str(size).isdecimal() else int(axis == 0) for axis, size in enumerate(shape)]


def _openvino(out: Path, threads: int) -> Answer:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(out / "openvino_model.xml"), "CPU", settings)
    request = model.create_infer_request()
    names = [name for given in model.inputs for name in given.get_names()]

    def step(last: Sequence[int], past: int) -> Any:
        return request.infer(_feed(names, last, past))["logits"][0, -1].copy()

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        request.reset_state()
        return _greedy(step, prompt, new_tokens)

    return answer
