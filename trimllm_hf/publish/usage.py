"""The usage example of a card: run as a reader would run it, in a separate process; its output is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL_ID = "MODEL_ID"  # placeholder for the model's name, which is known when the card is rendered
PROMPT = "Hello"
SEQ2SEQ = "an encoder-decoder"  # for which transformers has no pipeline
SEQ2SEQ_EXAMPLE = f"""from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = (auto.from_pretrained("{MODEL_ID}") for auto in (AutoTokenizer, AutoModelForSeq2SeqLM))
written = model.generate(**tokenizer(ASKED, return_tensors="pt"), max_new_tokens=40, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
"""
NEEDS_PACKAGE = "import trimllm_hf  # registers the model's type\n"
# Variables that a launcher sets, which a reader's process does not have.
LAUNCHER = (
    *("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_"),
    *("ACCELERATE_", "TORCHELASTIC_", "FSDP_"),
)


def example(pipeline_tag: str | None, prompt: Any, stock: bool, remote_code: bool = False) -> str | None:
    """The code of the example, with MODEL_ID in place of the model's name; None for a task without an example."""
    asked = PROMPT if prompt is None else prompt
    head = "" if stock else NEEDS_PACKAGE
    if pipeline_tag == SEQ2SEQ:
        return SEQ2SEQ_EXAMPLE.replace("ASKED", json.dumps(asked, ensure_ascii=False))
    trust = ", trust_remote_code=True" if remote_code else ""
    head += f'from transformers import pipeline\n\nmodel = pipeline("{pipeline_tag}", "{MODEL_ID}"{trust})\n'
    if pipeline_tag == "text-generation":
        tail = "[-1]" if isinstance(asked, list) else ""
        call = f'print(model(asked, max_new_tokens=40, do_sample=False)[0]["generated_text"]{tail})'
        return f"{head}asked = {json.dumps(asked, ensure_ascii=False)}\n{call}\n"
    if pipeline_tag in ("text-classification", "token-classification", "fill-mask"):
        return head + f"print(model({json.dumps(asked, ensure_ascii=False)}))\n"
    return None


def run_example(
    folder: Path,
    pipeline_tag: str | None,
    prompt: Any,
    stock: bool,
    remote_code: bool = False,
    timeout: float = 900,
) -> dict[str, Any]:
    """Run the example on the model in a folder.

    Args:
        folder: The model's folder.
        pipeline_tag: Its task, as the Hub names it; or SEQ2SEQ.
        prompt: What to ask; a neutral word by default.
        stock: Whether it must load without this package, which is then hidden from the process.
        remote_code: Whether it is loaded with the code beside its weights.
        timeout: Seconds.

    Returns:
        `code`, `output` and `stock`, or `not_run` with the reason.
    """
    code = example(pipeline_tag, prompt, stock, remote_code)
    if code is None:
        return {"not_run": f"there is no example for {'a model of its kind' if pipeline_tag is None else pipeline_tag}"}
    hidden = 'import sys\nsys.modules["trimllm_hf"] = None\n' if stock else ""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    command = [sys.executable, "-c", hidden + code.replace(MODEL_ID, str(folder.resolve()))]
    with tempfile.TemporaryDirectory() as modules:
        environment["HF_MODULES_CACHE"] = modules  # where transformers copies a model's code to
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"not_run": f"it took more than {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"not_run": lines[-1].replace(str(folder.resolve()), "the model")[:300]}
    return {"code": code, "output": done.stdout.strip(), "stock": stock}
