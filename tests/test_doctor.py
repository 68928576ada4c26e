"""What can be dropped is what drop_layers drops, said from the config alone."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from trimllm_hf import drop_layers
from trimllm_hf.cli import app
from trimllm_hf.surgery.feasibility import feasible_drops

doctor_module = import_module("trimllm_hf.cli.doctor")  # the room offers the app alone


def doctor(folder: Path, *more: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["doctor", str(folder), "--json", *more])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_a_llama_loses_any_layer_and_half_of_one(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)  # no weights are there
    said = doctor(tmp_path)
    assert said["can_be_dropped_alone"] == list(range(6)) and said["depths"] == [5, 4, 3, 2, 1] and said["sublayers"]
    assert said["parameters"] == tiny_model().num_parameters()
    # by hand: a pass is 6 block calls; scans at 6, 5, 4 layers make 15 + 10 + 6 calls, and start from 6 + 5 + 4
    assert said["scan_in_forward_passes"]["half_depth"] == pytest.approx((15 + 10 + 6 + 15) / 6)
    readers = {each["reader"]: each["drops"] for each in said["readers"]}
    assert readers["transformers 5"] == "whichever layers go" and "llama.cpp" in {name.split()[0] for name in readers}
    assert all(drops == "whichever layers go" or "not tried" in drops for drops in readers.values())
    model, held = tiny_model(), []
    for gone in ([], [0, 1, 2]):
        if gone:
            drop_layers(model, gone)
        held.append(4 * sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]))
    assert said["training_bytes"] == {"6": held[0], "3": held[1]} and said["too_old"] == []


def test_what_it_says_is_what_drop_layers_does() -> None:
    """A hybrid whose only attention is block 2: it stays."""
    config = AutoConfig.for_model(
        "jamba", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4,
        attn_layer_period=6, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    with torch.device("meta"):
        found = feasible_drops(AutoModelForCausalLM.from_config(config))
    assert set(found.alone) | set(found.refusals) == set(range(6)) and 2 in found.refusals
    for position in range(6):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        if position in found.alone:
            assert drop_layers(model, [position]).num_layers == 5
        else:
            with pytest.raises(ValueError) as refused:
                drop_layers(model, [position])
            assert str(refused.value) == found.refusals[position]


def test_it_says_who_reads_the_result(tmp_path: Path) -> None:
    """Of Gemma 3 one takes what a layer's number gives, another reads the config, a third misreads even the base."""
    tiny_model("gemma3_text", num_hidden_layers=7).config.save_pretrained(tmp_path)
    said = doctor(tmp_path)
    assert said["keep_the_pattern_alone"] == [6]  # the last one; a whole period would go together
    of_gemma = {each["reader"].split()[0]: each["drops"] for each in said["readers"]}  # without versions
    assert of_gemma["transformers"] == "whichever layers go"
    assert "portable=True" in of_gemma["mlx-lm"] and of_gemma["llama.cpp"].startswith("not even the base: ")


def text_of(folder: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["doctor", str(folder), *more], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_quantized_weights(tmp_path: Path) -> None:
    """What is said of sizes and readers is not said of weights in 4 bits."""
    config = tiny_model().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    said = doctor(tmp_path)
    drops = {each["drops"] for each in said["readers"] if each["reader"] != "transformers 5"}
    assert said["quantizer"] == "bitsandbytes" and drops == {"not tried with weights quantized by bitsandbytes"}
    assert "quantized (bitsandbytes)" in text_of(tmp_path)
    what_if = CliRunner().invoke(app, ["inspect", str(tmp_path), "--what-if"], env={"COLUMNS": "200"}).stdout
    assert "quantized (bitsandbytes); the sizes are those of the same model unquantized" in what_if


def test_of_an_encoder_decoder_it_says_which_part(tmp_path: Path) -> None:
    """A T5's first decoder layer has the relative positions of all."""
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "vocab_size": 97}
    config = AutoConfig.for_model("t5", num_layers=3, num_decoder_layers=4, **sizes)
    config.save_pretrained(tmp_path)
    refused = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert refused.exit_code == 1 and "one of type t5 with architectures None" in refused.stderr
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert "from 4 decoder layers down to 1" in (text := text_of(tmp_path)) and "--part encoder" in text
    assert "Cannot be dropped alone: 0." in text and "Nothing was changed" not in text
    assert "from 3 encoder layers down to 1" in text_of(tmp_path, "--part", "encoder")


def test_a_config_without_architectures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is taken for a causal language model; transformers' warnings are not repeated for each layer."""
    config = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    assert "names no architecture; taken for BertLMHeadModel" in text_of(tmp_path)
    assert "is_decoder" not in caplog.text


def test_a_version_that_is_too_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(num_hidden_layers=2).config.save_pretrained(tmp_path)
    monkeypatch.setattr(doctor_module, "requires", lambda name: ["torch>=99", "peft>=99; extra == 'dev'"])
    (told,) = doctor(tmp_path, code=1)["too_old"]
    assert told.startswith("torch 2.") and told.endswith("(needs >=99)")


def test_a_missing_package_is_named_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    installed = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name == "deepspeed" else installed(name))
    assert doctor(tmp_path, "--engine", "zero3", code=1)["missing_for_engine"] == ["deepspeed"]
    assert doctor(tmp_path, "--engine", "ddp")["missing_for_engine"] == []
    assert CliRunner().invoke(app, ["doctor", str(tmp_path), "--engine", "zero4"]).exit_code == 2


def test_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[bold]run"
    tiny_model().config.save_pretrained(folder)
    shown = CliRunner().invoke(app, ["doctor", str(folder)], env={"COLUMNS": "300"}).stdout
    assert str(folder) in shown and "'trimllm_hf[plot]'" in shown
