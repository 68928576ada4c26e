"""Speed of a trimmed model beside its base in other runtimes, whole and quantized: do the two gains multiply?

    pip install -e '.[runtimes]'
    python benchmarks/quality/base.py --output_dir BASE        # SmolLM2-135M-Instruct, or another base
    python benchmarks/runtimes.py --base BASE --work FOLDER    # writes FOLDER/runtimes.json; prints the table

Half of the base's blocks go, those with the least block influence on a text of this repository. Base and trimmed model are
exported as `trimllm export` does, and compared with transformers. Then, in a process for each runtime with one thread, all
its models are timed in turn, round by round: the prompt's pass, and decoding with the runtime's own cache. What is timed is
the processor's time of that process, which other work on the machine stretches less than the clock's. A runtime that is not
installed, or fails, gets a line that says so, and the others go on. What FOLDER holds is not exported again, and its rounds
are kept: on a busy machine, run the command several times with few rounds. FOLDER/trimmed can be made beforehand, by
`trimllm trim`, to time another choice of layers.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "trimllm_hf/publish/exports/tools"
# Of each runtime, what is timed in turn: None is the format's own precision.
VARIANTS: dict[str, tuple[str | None, ...]] = {
    "transformers": (None,),
    "torch.compile": (None,),
    "torchao": ("int8",),
    "gguf": (None, "Q8_0", "Q4_K_M"),
    "onnx": (None, "int8"),
    "openvino": (None, "int8"),
    "ctranslate2": (None, "int8"),
    "mlx": (None, "int8"),
}


# ---- In the process of one runtime


def in_torch(folder: Path, runtime: str) -> Callable[[Sequence[int], int], Any]:
    """transformers itself: eager, compiled with a static cache, or with weights in int8 by torchao."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    settings: dict[str, Any] = {}
    if runtime == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
    compiled = runtime == "torch.compile"
    call = torch.compile(model, dynamic=False) if compiled else model

    @torch.no_grad()
    def answer(prompt: Sequence[int], new_tokens: int) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=256) if compiled else DynamicCache(config=model.config)
        tokens: list[int] = []
        last, past = list(prompt), 0
        while len(tokens) < new_tokens:
            positions = torch.arange(past, past + len(last))[None]
            row = call(input_ids=torch.tensor([last]), position_ids=positions, cache=cache).logits[0, -1]
            past += len(last)
            tokens.append(int(row.argmax()))
            last = tokens[-1:]
        return tokens, []

    return answer


def in_turn(job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each model, the seconds of each round: of the prompt's pass and of a decoded token, by two clocks."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(TOOLS))
    answers = []
    for model in job["models"]:
        if model["tool"] is None:
            answers.append(in_torch(Path(model["folder"]), job["runtime"]))
        else:
            answers.append(
                importlib.import_module(model["tool"]).load(Path(model["folder"]), ignore_end=True, **model["settings"])
            )
    prompt, tokens = job["prompt"], job["new_tokens"]
    found: list[dict[str, Any]] = [{"prefill": [], "decode": [], "prefill_wall": [], "decode_wall": []} for _ in answers]
    for number in range(-1, job["rounds"]):  # the first warms up, and compiles
        for answer, times in zip(answers, found, strict=True):
            clocks = []
            for length in (1, tokens + 1):
                cpu, wall = time.process_time(), time.perf_counter()
                times["tokens"] = answer(prompt, length)[0]
                clocks.append((time.process_time() - cpu, time.perf_counter() - wall))
            if number >= 0:
                for kind, suffix in ((0, ""), (1, "_wall")):
                    times[f"prefill{suffix}"].append(clocks[0][kind])
                    times[f"decode{suffix}"].append((clocks[1][kind] - clocks[0][kind]) / tokens)
    return found


# ---- Outside it


def trimmed(base: Path, folder: Path, size: int) -> None:
    """A checkpoint with half of the base's blocks: those with the least influence leave, the first and the last never."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimllm_hf import score_layers
    from trimllm_hf.loading.trimmed_folder import write_kept_layers

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids[0, : 6 * size].reshape(6, 1, size)
    scores = score_layers(model, [{"input_ids": batch, "labels": batch} for batch in ids], importance="block_influence")
    depth = len(scores)
    order = [layer for layer in scores.argsort().tolist() if layer not in (0, depth - 1)]
    write_kept_layers(base, sorted(set(range(depth)) - set(order[: depth // 2])), folder)


def exported(args: argparse.Namespace, runtime: str, folders: dict[str, Path]) -> list[dict[str, Any]]:
    """The models of one runtime, exported and compared where they are not yet; base and trimmed one beside each other."""
    from transformers import AutoConfig

    from trimllm_hf.publish.exports.comparison import Reference, prompts_for
    from trimllm_hf.publish.exports.formats import FORMATS
    from trimllm_hf.publish.exports.tool import Tool

    models = []
    for variant in VARIANTS[runtime]:
        for name, source in folders.items():
            plain: dict[str, Any] = {"runtime": runtime, "variant": variant, "model": name}
            if runtime in FORMATS:
                made = FORMATS[runtime]
                out, whole = (args.work / f"{runtime}-{each or 'whole'}-{name}" for each in (variant, None))
                if not (report := out.with_suffix(".json")).exists():
                    print(f"{time.strftime('%H:%M:%S')} {runtime}, {variant or 'whole'}, {name}: exporting", flush=True)
                    shutil.rmtree(out, ignore_errors=True)
                    told = {"llama_cpp": str(args.llama_cpp)} if args.llama_cpp and runtime == "gguf" else {}
                    tool = Tool(made, args.python, told)
                    if variant is None:
                        tool.convert(source, out, made.dtype)
                    else:
                        tool.quantize(source, whole, out, variant)
                    prompts = prompts_for(source, AutoConfig.from_pretrained(source))
                    report.write_text(json.dumps(dataclasses.asdict(tool.compared(out, Reference(source), prompts))))
                plain |= {"tool": made.tool, "folder": str(out), "settings": made.settings, "dtype": made.dtype}
                plain |= {"comparison": json.loads(report.read_text())}
            else:
                plain |= {"tool": None, "folder": str(source), "settings": {}, "dtype": "float32"}
            kept = ("*.gguf", "*.onnx*", "*.bin", "*.safetensors")
            plain["bytes"] = sum(file.stat().st_size for each in kept for file in Path(plain["folder"]).glob(each))
            models.append(plain)
    return models


def measured(args: argparse.Namespace, runtime: str, folders: dict[str, Path], prompt: list[int]) -> list[dict[str, Any]]:
    """Export, and time in a process of its own."""
    models = exported(args, runtime, folders)
    job = {"runtime": runtime, "models": models, "prompt": prompt, "new_tokens": args.new_tokens, "rounds": args.rounds}
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [args.python, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one})
    if done.returncode != 0:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-3:]))
    times = json.loads(done.stdout.splitlines()[-1])
    return [{**model, **found} for model, found in zip(models, times, strict=True)]


def with_earlier(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was timed now, behind the rounds of earlier runs of the same models."""
    models = ("runtime", "variant", "model")
    before = {tuple(row[name] for name in models): row for row in rows}
    for row in found:
        if known := before.get(tuple(row[name] for name in models)):
            for what in ("prefill", "decode", "prefill_wall", "decode_wall"):
                row[what] = known[what] + row[what]
    return found


def ratio(base: dict[str, Any], model: dict[str, Any], what: str) -> str:
    """Median over the rounds, and the interval of that median."""
    from trimllm_hf.latency.report import median_interval

    ratios = [one / other for one, other in zip(base[what], model[what], strict=True)]
    low, high, _ = median_interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each precision of each runtime."""
    heads = (
        "runtime", "weights", "ms a token, base", "trimmed", "decoding", "prefill", "bytes",
        "quantized alone", "trimmed and quantized", "greedy tokens equal: base, trimmed",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    whole: dict[str, dict[str, Any]] = {}
    stock = {row["model"]: row["tokens"] for row in rows if row["runtime"] == "transformers"}
    for base, model in zip(rows[::2], rows[1::2], strict=True):
        first = whole.setdefault(base["runtime"], base)
        alone = both = equal = ""
        if first is not base and len(first["decode"]) == len(base["decode"]):
            alone, both = ratio(first, base, "decode"), ratio(first, model, "decode")
        if "comparison" in model:
            pairs = [(each["comparison"]["equal_tokens"], each["comparison"]["tokens"]) for each in (base, model)]
            equal = ", ".join(f"{same} of {count}" for same, count in pairs)
        elif stock and base["runtime"] != "transformers":  # of those that were timed
            pairs = [(each["tokens"], stock[each["model"]]) for each in (base, model)]
            equal = ", ".join(f"{sum(map(int.__eq__, ours, theirs))} of {len(theirs)}" for ours, theirs in pairs)
        in_memory = base["tool"] is None and base["variant"] is not None  # quantized when it is loaded: no file of its own
        cells = (
            base["runtime"], base["variant"] or base.get("dtype", "float32"), f"{1e3 * median(base['decode']):.1f}",
            f"{1e3 * median(model['decode']):.1f}", ratio(base, model, "decode"), ratio(base, model, "prefill"),
            "" if in_memory else f"{base['bytes'] / model['bytes']:.2f}", alone, both, equal,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--work", type=Path, help="where exports and runtimes.json lie")
    parser.add_argument("--runtimes", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the runtimes")
    parser.add_argument("--llama_cpp", type=Path, help="a folder of llama.cpp with its converter")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(in_turn(json.loads(args.job))))
        return
    if args.base is None or args.work is None:
        parser.error("--base and --work are needed")
    from transformers import AutoTokenizer

    args.work.mkdir(parents=True, exist_ok=True)
    folders = {"base": args.base, "trimmed": args.work / "trimmed"}
    if not folders["trimmed"].exists():
        trimmed(args.base, folders["trimmed"], 128)
    text = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    prompt = list(AutoTokenizer.from_pretrained(args.base)(text).input_ids)[: args.prompt_tokens]
    results = args.work / "runtimes.json"
    about = {"machine": platform.processor(), "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    earlier = json.loads(results.read_text()) if results.exists() else {**about, "rows": []}
    rows = earlier.pop("rows")
    if earlier != about:
        parser.error(f"{results} was timed with {earlier}, not {about}: give another --work")
    for runtime in args.runtimes:
        print(f"{time.strftime('%H:%M:%S')} {runtime}, load {os.getloadavg()[0]:.1f}", flush=True)
        try:
            found = measured(args, runtime, folders, prompt)
        except (ValueError, RuntimeError) as error:
            print(f"{runtime}: {str(error)[-400:]}", flush=True)
            continue
        rows = [row for row in rows if row["runtime"] != runtime] + with_earlier(found, rows)
        results.write_text(json.dumps({**about, "rows": rows}))
    print(table(rows))


if __name__ == "__main__":
    main()
