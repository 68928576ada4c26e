"""Converts or quantizes a folder by a tool, or answers prompts by its runtime: see the room's `__init__`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(tool: str, what: str, source: str, *rest: str) -> None:
    """Do one of the four, and leave the answers of the last in a file."""
    module = importlib.import_module(tool)
    if what == "check":
        if hasattr(module, "check"):
            module.check(**json.loads(source))
        return
    if what == "convert":
        out, settings = rest
        module.convert(Path(source), Path(out), **json.loads(settings))
        return
    if what == "quantize":
        plain, out, settings = rest
        module.quantize(Path(source), Path(plain), Path(out), **json.loads(settings))
        return
    prompts, result, settings = rest
    import numpy as np

    answer = module.load(Path(source), **json.loads(settings))
    found: dict[str, Any] = {}
    asked = json.loads(Path(prompts).read_text(encoding="utf-8"))
    for number, prompt in enumerate(asked["prompts"]):
        tokens, logits = answer(prompt, asked["new_tokens"])
        found[f"tokens{number}"], found[f"logits{number}"] = np.array(tokens), np.array(logits, dtype=np.float32)
    np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
