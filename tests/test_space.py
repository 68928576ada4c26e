"""The Space template: it starts, and both models answer over its API; without a model it says what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_base import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimllm_hf import load_kept_layers

SPACE = Path(__file__).resolve().parents[1] / "spaces/compare"


def test_its_card_names_its_file() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert re.search(r"^gradio>=", (SPACE / "requirements.txt").read_text(encoding="utf-8"), re.M)


@pytest.mark.slow
def test_without_a_model_it_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRIMMED_MODEL"}
    done = subprocess.run([sys.executable, SPACE / "app.py"], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "Expected the environment variable TRIMMED_MODEL" in done.stderr


@pytest.mark.slow
def test_both_models_answer(tmp_path: Path) -> None:
    """What is written is what the models write by themselves."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    base, trimmed = tmp_path / "base", tmp_path / "trimmed"
    save_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    load_kept_layers(base, [0, 2, 5]).save_pretrained(trimmed)
    tokenizer.save_pretrained(trimmed)
    env = {**os.environ, "TRIMMED_MODEL": str(trimmed), "BASE_MODEL": str(base), "GRADIO_SERVER_PORT": "7871"}
    env |= {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, SPACE / "app.py"], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, until = None, time.monotonic() + 200
        while url is None and time.monotonic() < until and process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())
            url = found[0] if found else None
            time.sleep(0.5)
        assert url is not None, (tmp_path / "log").read_text()[-3000:]
        shown = Client(url, verbose=False).predict("w1 w2 w3", 5, api_name="/compare")
    finally:
        process.terminate()
        process.wait(30)
    for place, (folder, layers) in enumerate(((base, 6), (trimmed, 3))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 3:]
        assert shown[2 * place] == tokenizer.decode(written, skip_special_tokens=True)
        assert shown[2 * place + 1].startswith(f"{layers} layers, {model.num_parameters():,} parameters, ")
