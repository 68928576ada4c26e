"""Decoding speed of a half-depth model beside its base, what share of the byte bound that is, and quantized rivals.

    python benchmarks/latency.py        # CPU: 12 -> 6 and 24 -> 12 blocks; 5 GB of memory
    python benchmarks/latency.py --shapes llama-2-7b llama-3.1-8b --dtype bfloat16 --device cuda \
        --rivals int8 nf4 torchao-int8 torchao-int4        # 40 GB of the GPU's memory
    python benchmarks/latency.py --shapes llama-2-7b --dtype bfloat16 --device cuda --cache static --compile

Random weights: latency depends on their shapes alone. Every second block is dropped. Each model is measured in turn with
the base at full depth, so that a drift of the machine meets both. Rivals are what a user would pick instead: bitsandbytes'
LLM.int8 and NF4, torchao's weight-only int8 and int4, each at full depth and on the trimmed model; one that is not
installed, or does not run here, gets a line that says so. A JSON file per row goes to --out, the table to the terminal.

`cpu-12` and `cpu-24` are Llamas whose weights do not fit the processor's cache, so that decoding waits for memory, as
it does on every device with a real model.
"""

import argparse
import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from trimllm_hf import LatencyReport, drop_layers, measure_latency

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA_31_8B = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CPU = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "vocab_size": 8000}
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 256}
    | {"num_hidden_layers": 4},  # to try the options
    "cpu-12": CPU | {"num_hidden_layers": 12},
    "cpu-24": CPU | {"num_hidden_layers": 24},
    "llama-2-7b": LLAMA_2_7B | {"num_hidden_layers": 32},
    "llama-3.1-8b": LLAMA_31_8B | {"num_hidden_layers": 32},
}


def torchao(name: str, **settings: Any) -> TorchAoConfig:
    """A weight-only quantization of torchao's, by the name of its config."""
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**settings))


RIVALS: dict[str, Callable[[torch.dtype, str], Any]] = {
    "int8": lambda dtype, device: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda dtype, device: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    ),
    "torchao-int8": lambda dtype, device: torchao("Int8WeightOnlyConfig"),
    # by torch's own kernel where there is one: the usual packing needs one more package
    "torchao-int4": lambda dtype, device: torchao(
        "Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d" if device == "cuda" else "plain"
    ),
}


def main() -> None:
    """Measure each shape and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu-12", "cpu-24"])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--cache", default="dynamic")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        measure(name, args)


def measure(shape: str, args: argparse.Namespace) -> None:
    """The table of a shape."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # a config of its own: from_config keeps the object it is given, and a drop changes it
        trimmed = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    drop_layers(trimmed, list(range(1, config.num_hidden_layers, 2)))
    rows: list[tuple[str, Callable[[], Any]]] = [("trimmed", lambda: trimmed)]
    for rival in args.rivals:
        rows += [(rival, lambda rival=rival: quantized(base, rival, dtype))]
        rows += [(f"trimmed, {rival}", lambda rival=rival: quantized(trimmed, rival, dtype))]
    print(
        f"\n{shape}, {args.dtype}, prompt of {args.prompt_tokens}, {args.new_tokens} new tokens, {args.cache} cache", end=""
    )
    print(f"{', compiled' if args.compile else ''}; load {os.getloadavg()[0]:.1f} at the start")
    for number, (what, make) in enumerate(rows):
        try:
            report = measure_latency(
                make(), base, batch_sizes=args.batch_sizes, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens,
                repeats=args.repeats, cache=args.cache, compile=args.compile,
            )  # fmt: skip
        except Exception as error:  # a rival fails in as many ways as there are packages: its line says how
            if what == "trimmed":
                raise
            print(f"| {what} | not run: {type(error).__name__}: {str(error).splitlines()[0][:120]} |")
        else:
            report.to_json(args.out / f"latency-{shape}-{args.device}-{what.replace(', ', '-')}.json")
            show(what, report, head=number == 0)
        gc.collect()


def quantized(model: Any, rival: str, dtype: torch.dtype) -> Any:
    """The same weights, quantized while transformers loads them, as a user would."""
    quantization = RIVALS[rival](dtype, model.device.type)
    return type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=model.state_dict(), dtype=dtype,
        quantization_config=quantization, device_map={"": model.device},
    )  # fmt: skip


def show(what: str, report: LatencyReport, head: bool) -> None:
    """A model's rows; the base's, and what was measured on, above the first."""
    assert report.base_sizes is not None
    if head:
        env = report.environment
        print(f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, transformers {env['transformers']}\n")
        print("| | blocks | batch | GB of weights | peak GB | tokens/s | times as fast | of the bound | prefill ms |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        for run in report.base_runs:
            print(row("full depth", report.base_sizes, run, "", ""))
    for run in report.runs:
        decode = report.speedup("decode", run.batch_size)
        assert decode is not None
        times = f"{decode.ratio:.2f} [{decode.low:.2f}, {decode.high:.2f}]"
        # of a quantized model the bytes on disk say little: scales and look-up tables are read too
        share = f"{decode.share_of_bound:.2f} of {decode.byte_bound:.2f}" if what == "trimmed" else ""
        print(row(what, report.sizes, run, times, share), flush=True)


def row(what: str, sizes: Any, run: Any, times: str, share: str) -> str:
    """A line of the table."""
    cells = [what, sizes.num_layers, run.batch_size, f"{sizes.weight_bytes / 1e9:.2f}", f"{run.peak_memory_bytes / 1e9:.2f}"]
    cells += [f"{run.decode_tokens_per_s:.1f}", times, share, f"{run.prefill_ms.p50:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
