"""How fast a base decodes with fewer blocks, beside itself at full depth, in turn: `speed-NAME.json` beside this file.

    python benchmarks/quality/speed.py 12x96

Batch 1, prompts of 64 tokens, 32 new ones, one thread. Random weights of the base's shapes, as `base-NAME.json` has them,
and the last blocks are dropped, for speed depends on shapes and numbers alone.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from pretrain import make_model

from trimllm_hf import drop_layers, measure_latency

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the NAME of a base-NAME.json")
    parser.add_argument("--folder", type=Path, default=HERE, help="where that lies")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads((args.folder / f"base-{args.base}.json").read_text())["settings"]
    base, depth = make_model(settings["layers"], settings["width"], settings["vocabulary"]), settings["layers"]
    rows = []
    for layers in (depth * 3 // 4, depth // 2, depth // 3, depth // 4):
        trimmed = copy.deepcopy(base)
        drop_layers(trimmed, list(range(layers, depth)))
        report = measure_latency(trimmed, base, batch_sizes=[1], prompt_tokens=64, new_tokens=32, repeats=args.repeats)
        decode = report.speedup("decode")
        assert decode is not None
        rows.append({"layers": layers, "times_as_fast": decode.ratio, "low": decode.low, "high": decode.high})
        print(f"{layers} of {depth} blocks: {decode.ratio:.2f} times as fast [{decode.low:.2f}, {decode.high:.2f}]")
    told = {"layers": depth, "decode": rows, "confidence": decode.confidence, "environment": report.environment}
    (args.folder / f"speed-{args.base}.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
