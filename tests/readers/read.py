"""Reads the folders that `folders.py` wrote, in another reader's environment: it imports nothing of this project.

    PYTHON read.py transformers|mlx|ctranslate2 FOLDER [beginning of a name …]

prints one line of JSON for each model: its name, the largest difference of its logits to those of transformers 5 and
their range; or the error.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def by_transformers(folder: Path, inputs: dict[str, Any]) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"keys: {[sorted(map(str, found))[:2] for found in info.values() if found]}")
    transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.float().numpy()


def by_mlx(folder: Path, inputs: dict[str, Any]) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(inputs["input_ids"])).astype(mx.float32))


def by_ctranslate2(folder: Path, inputs: dict[str, Any]) -> Any:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as converted:
        TransformersConverter(str(folder)).convert(converted, force=True)
        generator = ctranslate2.Generator(converted, compute_type="float32")
        return np.array(generator.forward_batch(inputs["input_ids"].tolist()))


READERS = {"transformers": by_transformers, "mlx": by_mlx, "ctranslate2": by_ctranslate2}


def main() -> None:
    warnings.filterwarnings("ignore")
    read = READERS[sys.argv[1]]
    for logits in sorted(Path(sys.argv[2]).glob("*.npy")):
        folder = logits.with_suffix("")
        if sys.argv[3:] and not folder.name.startswith(tuple(sys.argv[3:])):
            continue
        found: dict[str, Any] = {"name": folder.name}
        try:
            want = np.load(logits)
            got = read(folder, dict(np.load(f"{folder}.inputs.npz")))
            found |= {"difference": float(np.abs(got - want).max()), "range": float(np.ptp(want))}
        except (Exception, SystemExit) as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
