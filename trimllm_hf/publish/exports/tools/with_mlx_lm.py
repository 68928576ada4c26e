"""MLX: `mlx_lm.convert` converts, `mlx_lm` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# From the ids of a prompt and a number: so many tokens, greedily, and the logits that each is chosen from.
Answer = Callable[[Sequence[int], int], tuple[list[int], list[Any]]]


def convert(folder: Path, out: Path, dtype: str | None = None, **quantized: Any) -> None:
    """Write a folder that `mlx_lm.load` takes."""
    from mlx_lm import convert as mlx_convert

    mlx_convert(str(folder), mlx_path=str(out / "model"), dtype=dtype, **quantized)
    for file in (out / "model").iterdir():  # it refuses a folder that is there
        file.rename(out / file.name)
    (out / "model").rmdir()


def quantize(folder: Path, converted: Path, out: Path, kind: str) -> None:
    """The same, in groups of 64 weights of so many bits."""
    convert(folder, out, quantize=True, q_bits=int(kind.removeprefix("int")), q_group_size=64)


def load(out: Path, threads: int = 1, ignore_end: bool = False) -> Answer:
    """What answers prompts, greedily, with a cache, beyond an end of text as well.

    MLX takes its number of threads from the machine.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(out)

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        cache = make_prompt_cache(model)
        tokens: list[int] = []
        logits: list[Any] = []
        last = list(prompt)
        while len(tokens) < new_tokens:
            row = np.array(model(mx.array([last]), cache=cache)[0, -1].astype(mx.float32))
            logits.append(row)
            tokens.append(int(row.argmax()))
            last = tokens[-1:]
        return tokens, logits

    return answer
