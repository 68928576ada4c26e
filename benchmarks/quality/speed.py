"""How fast the base decodes with fewer blocks, beside itself at full depth, in turn: `speed.json` beside this file.

    python benchmarks/quality/speed.py

Batch 1, prompts of 64 tokens, 32 new ones, one thread; the last blocks are dropped, for speed depends on their number alone.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trimllm_hf import drop_layers, measure_latency

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path.home() / ".cache/trimllm_hf/base")
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 6, 4, 3], help="blocks that are kept")
    parser.add_argument("--out", type=Path, default=HERE / "speed.json")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(args.base)
    depth = base.config.num_hidden_layers
    rows = []
    for layers in args.layers:
        trimmed = copy.deepcopy(base)
        drop_layers(trimmed, list(range(layers, depth)))
        report = measure_latency(trimmed, base, batch_sizes=[1], prompt_tokens=64, new_tokens=32, repeats=args.repeats)
        decode = report.speedup("decode")
        assert decode is not None
        rows.append({"layers": layers, "times_as_fast": decode.ratio, "low": decode.low, "high": decode.high})
        print(f"{layers} of {depth} blocks: {decode.ratio:.2f} times as fast [{decode.low:.2f}, {decode.high:.2f}]")
    told = {"layers": depth, "decode": rows, "confidence": decode.confidence, "environment": report.environment}
    args.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
