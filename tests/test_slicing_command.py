"""`trimllm slice`, and the commands that look at what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_base import save_base
from test_cli import run
from tiny import tokens
from transformers import AutoConfig, AutoModelForCausalLM

from trimllm_hf import SliceMap, write_card
from trimllm_hf.publish.card_check import check_card
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.folder import hide_local_base
from trimllm_hf.publish.model_check import check_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("base")
    data = folder / "train.jsonl"
    words = [" ".join(f"w{(7 * row + n) % 40}" for n in range(12)) for row in range(24)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return save_base(folder / "model"), str(data)


def test_slice_writes_what_loads_and_the_others_read(base: tuple[str, str], tmp_path: Path) -> None:
    model, data = base
    out = tmp_path / "sliced"
    shown = run("slice", model, out, "--data", data, "--ratio", "0.25", "--multiple", 1, "--remote-code")
    assert "of 32 hidden states (25.0% cut in the mean, by redundancy, spread 0.5)" in shown
    found = SliceMap.from_config(AutoModelForCausalLM.from_pretrained(out).config)
    assert found is not None and found.base_model == model and found.tokens == 24 * 12
    assert (out / "tokenizer.json").is_file() and (out / "modeling_trimllm.py").is_file()
    plain = json.loads(run("inspect", out, "--json"))
    assert plain["sliced"] == found.to_dict() and not plain["trimmed"]
    assert plain["weights"]["parameters"] == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    seen = run("inspect", out)
    assert "sliced from" in seen and "25.0% cut" in seen
    report = json.loads(run("bench", out, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--warmup", 0, "--json"))
    assert report["base_runs"] and report["runs"]


def test_its_card_shows_the_widths(base: tuple[str, str], tmp_path: Path) -> None:
    model, data = base
    out = tmp_path / "sliced"
    run("slice", model, out, "--data", data, "--multiple", 1)
    path = write_card(out, measured=False)
    text = path.read_text(encoding="utf-8")
    found = SliceMap.from_config(AutoConfig.from_pretrained(out))
    assert found is not None
    assert ", ".join(map(str, found.widths)) in text and "25.0% cut in the mean" in text
    assert "Whole layers were" not in text and "The layers are narrower" in text
    assert str(tmp_path) not in text and model not in text
    report = json.loads((out / "trim_report.json").read_text(encoding="utf-8"))
    assert ("trim_widths.png" in report["pictures"]) == (out / "trim_widths.png").is_file()
    hide_local_base(out)  # what a push does, and asks
    contents = contents_of(out)
    check_card(contents, check_model(contents))
    assert model not in (out / "config.json").read_text()


def test_slice_of_channels_alike_writes_a_stock_model(base: tuple[str, str], tmp_path: Path) -> None:
    model, data = base
    options = ("--data", data, "--what", "mlp", "--allocation", "uniform", "--ratio", "0.25", "--json")
    plain = json.loads(run("slice", model, tmp_path / "out", *options))
    assert plain["map"]["what"] == "mlp"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["intermediate_size"] == 48
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens() % 40).logits.isfinite().all()


def test_what_slice_refuses(base: tuple[str, str], tmp_path: Path) -> None:
    model, data = base
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "new or empty" in run("slice", model, tmp_path / "full", "--data", data, code=1)
    assert "ratio between 0 and 1" in run("slice", model, tmp_path / "out", "--data", data, "--ratio", 1.5, code=1)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "w1 w2 w3"}\n')
    assert "at least 32 tokens" in run("slice", model, tmp_path / "out", "--data", short, code=1)
    assert not (tmp_path / "out").exists()
