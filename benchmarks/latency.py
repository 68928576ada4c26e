"""Decoding speed of a half-depth model beside its base, and what share of the byte bound that is.

    python benchmarks/latency.py        # CPU: 12 -> 6 and 24 -> 12 blocks; 5 GB of memory
    python benchmarks/latency.py --shapes llama-2-7b llama-3.1-8b --dtype bfloat16 --device cuda
    python benchmarks/latency.py --shapes llama-2-7b --dtype bfloat16 --device cuda --cache static --compile

Random weights: latency depends on their shapes alone. Every second block is dropped. One JSON file per shape goes to
--out; the table goes to the terminal.

`cpu-12` and `cpu-24` are Llamas whose weights do not fit the processor's cache, so that decoding waits for memory, as
it does on every device with a real model.
"""

import argparse
import copy
import gc
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trimllm_hf import drop_layers, measure_latency

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA_31_8B = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CPU = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "vocab_size": 8000}
SHAPES = {
    "cpu-12": CPU | {"num_hidden_layers": 12},
    "cpu-24": CPU | {"num_hidden_layers": 24},
    "llama-2-7b": LLAMA_2_7B | {"num_hidden_layers": 32},
    "llama-3.1-8b": LLAMA_31_8B | {"num_hidden_layers": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu-12", "cpu-24"])
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
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096, tie_word_embeddings=False)
        dtype = getattr(torch, args.dtype)
        with torch.device(args.device):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
            # a config of its own: from_config keeps the object it is given, and a drop changes it
            trimmed = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        drop_layers(trimmed, list(range(1, config.num_hidden_layers, 2)))
        gc.collect()
        report = measure_latency(
            trimmed,
            base,
            batch_sizes=args.batch_sizes,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
            cache=args.cache,
            compile=args.compile,
        )
        report.to_json(args.out / f"latency-{name}-{args.device}.json")
        env = report.environment
        print(
            f"\n{name}, {report.base_sizes.num_layers} -> {report.sizes.num_layers} blocks, {env['dtype']}, "
            f"{env['device_name']}, {env['threads']} threads, {report.base_sizes.weight_bytes / 1e9:.2f} -> "
            f"{report.sizes.weight_bytes / 1e9:.2f} GB, torch {env['torch']}, transformers {env['transformers']}"
        )
        heads = f"{'base':>14} {'trimmed':>14} {'ratio':>6} {'interval':>14} {'bound':>6} {'share':>6}"
        print(f"{'':>8} {'batch':>5} {heads}")
        for speedup in report.speedups:
            at = [run.batch_size for run in report.runs].index(speedup.batch_size)
            of_base, of_trimmed = report.base_runs[at], report.runs[at]
            if speedup.what == "decode":
                shown = [f"{run.decode_tokens_per_s:.1f} tokens/s" for run in (of_base, of_trimmed)]
                tail = f"{speedup.byte_bound:6.2f} {speedup.share_of_bound:6.2f}"
            else:
                shown, tail = [f"{run.prefill_ms.p50:.1f} ms" for run in (of_base, of_trimmed)], ""
            print(
                f"{speedup.what:>8} {speedup.batch_size:>5} {shown[0]:>14} {shown[1]:>14} {speedup.ratio:6.2f} "
                f"{f'{speedup.low:.2f} to {speedup.high:.2f}':>14} {tail}"
            )
        del base, trimmed
        gc.collect()


if __name__ == "__main__":
    main()
