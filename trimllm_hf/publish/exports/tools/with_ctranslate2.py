"""CTranslate2: its converter for transformers models, and its generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# From the ids of a prompt and a number: so many tokens, greedily, and the logits that each is chosen from.
Answer = Callable[[Sequence[int], int], tuple[list[int], list[Any]]]


def convert(folder: Path, out: Path, dtype: str = "float32") -> None:
    """Write a folder that `ctranslate2.Generator` takes."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(out), quantization=dtype, force=True)


def quantize(folder: Path, converted: Path, out: Path, kind: str) -> None:
    """The same, with weights in `kind`."""
    convert(folder, out, kind)


def load(out: Path, threads: int = 1, ignore_end: bool = False) -> Answer:
    """What answers prompts, greedily, with a cache; tokens go in by their names, as CTranslate2 takes them."""
    import ctranslate2
    import numpy as np

    generator = ctranslate2.Generator(str(out), intra_threads=threads, compute_type="default")
    names = _vocabulary(out)

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Any]]:
        (found,) = generator.generate_batch(
            [[names[token] for token in prompt]], max_length=new_tokens, sampling_topk=1, include_prompt_in_result=False,
            return_logits_vocab=not ignore_end, **({"end_token": [len(names) - 1]} if ignore_end else {}),
        )  # fmt: skip
        rows = found.logits[0] if found.logits else []
        return list(found.sequences_ids[0]), [np.array(row, dtype=np.float32).reshape(-1) for row in rows]

    return answer


def _vocabulary(out: Path) -> list[str]:
    import json

    (file,) = out.glob("vocabulary.*")
    text = file.read_text(encoding="utf-8")
    return list(json.loads(text)) if file.suffix == ".json" else text.splitlines()
