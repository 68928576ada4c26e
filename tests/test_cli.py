"""The command line: what it prints, for people and for machines, and the exit status that a script can trust."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

from trimllm_hf import LatencyReport, drop_layers
from trimllm_hf.cli import app
from trimllm_hf.latency.depths import depths, depths_between
from trimllm_hf.latency.sizes import byte_bound, sizes_of

COMMANDS = sorted(get_command(app).commands)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder of a model of six layers that keeps four, saved in shards; and the model."""
    folder = tmp_path_factory.mktemp("trimmed")
    model = tiny_model()
    drop_layers(model, [4])
    drop_layers(model, [1])
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder, model


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints on stdout; on stderr where it fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    assert f"trimllm {command} " in run(command, "--help").split("Example", 1)[1]


def test_without_a_command_it_shows_the_help_and_fails_as_a_usage_error() -> None:
    assert "inspect" in CliRunner().invoke(app, []).output
    assert "No such command" in run("inpsect", code=2)
    assert "Missing argument" in run("inspect", code=2)


def test_inspect_prints_the_map_and_what_the_files_weigh(trimmed: tuple[Path, PreTrainedModel]) -> None:
    folder, model = trimmed
    shown = run("inspect", folder)
    assert "█░██░█" in shown and "keeps 4 of the 6 layers" in shown
    plain = json.loads(run("inspect", folder, "--json"))
    assert plain["map"]["kept_layers"] == [0, 2, 3, 5] and plain["dropped_layers"] == [1, 4]
    assert [record["dropped"] for record in plain["map"]["history"]] == [[4], [1]]
    assert plain["weights"]["parameters"] == model.num_parameters()
    assert plain["weights"]["bytes"] == sum(p.nbytes for p in model.parameters())
    assert len(plain["weights"]["files"]) > 1


def test_what_if_says_what_a_trimmed_model_weighs(tmp_path: Path) -> None:
    """Against models that were really trimmed to each depth."""
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        model.config.save_pretrained(tmp_path)
        plain = json.loads(run("inspect", tmp_path, "--what-if", "--json"))
        assert plain["equal_blocks"]
        whole, by_depth = sizes_of(model), {depth.pop("num_layers"): depth for depth in plain["depths"]}
        for left in range(6, 0, -1):
            sizes = sizes_of(model)
            assert by_depth[left] == {
                "parameters": sizes.parameters,
                "weight_bytes": sizes.weight_bytes,
                "kv_cache_bytes_per_token": sizes.kv_cache_bytes_per_token,
                "byte_bound": pytest.approx(byte_bound(whole, sizes)),
            }
            if left > 1:
                drop_layers(model, [left // 2])
        assert set(by_depth) == set(range(1, 7))
    assert "bytes a token" in run("inspect", tmp_path, "--what-if")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("new/what_if.png", "what_if.svg"):
        run("inspect", tmp_path, "--what-if", "--picture", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_all_depths_follow_from_two() -> None:
    model, base = tiny_model(), tiny_model()
    drop_layers(model, [1, 3])
    found, expected = depths_between(sizes_of(base), sizes_of(model)), depths(base.config)[0]
    assert [asdict(depth) for depth in found] == [pytest.approx(asdict(depth)) for depth in expected]
    with pytest.raises(ValueError, match="Expected a model of fewer layers than 6, got one of 6"):
        depths_between(sizes_of(base), sizes_of(base))


def test_what_if_says_when_blocks_differ_in_size(tmp_path: Path) -> None:
    tiny_model("gpt_neox").config.save_pretrained(tmp_path)
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
        n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    assert json.loads(run("inspect", tmp_path, "--what-if", "--json"))["equal_blocks"]
    config.save_pretrained(tmp_path)
    plain = json.loads(run("inspect", tmp_path, "--what-if", "--json"))
    assert not plain["equal_blocks"] and plain["depths"][1]["byte_bound"] is None
    assert "average size" in run("inspect", tmp_path, "--what-if")


def test_trim_writes_the_layers_that_are_named(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    by_kept = json.loads(run("trim", "--kept", "0-1,4-5", tmp_path / "base", tmp_path / "a", "--json"))
    assert "██░░██" in run("trim", "--drop", "2,3", tmp_path / "base", tmp_path / "b")
    drop_layers(base, [2, 3])
    for folder in ("a", "b"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    assert by_kept["map"]["kept_layers"] == [0, 1, 4, 5]
    assert by_kept["weights"]["parameters"] == base.num_parameters()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "exactly one of --kept and --drop"),
        (["--kept", "0", "--drop", "1"], 2, "exactly one of"),
        (["--kept", "0-"], 2, "Expected layers like"),
        (["--kept", "3-1"], 2, "Expected layers like"),
        (["--kept", "0-99999999999"], 2, "Expected layers of a model"),
        (["--drop", "4,6"], 1, "the base has 6), got [6] to drop"),
        (["--kept", "0,6"], 1, "Expected kept_layers from 0 to 5"),
        (["--kept", "0,0"], 1, "without repeats"),
        (["--drop", "0-5"], 1, "at least one"),
    ],
)
def test_trim_refuses(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    shown = " ".join(run("trim", *arguments, tmp_path / "base", tmp_path / "out", code=code).replace("│", " ").split())
    assert said in shown and not (tmp_path / "out").exists()


def test_bench_measures_a_model_beside_the_base_that_its_map_names(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    run("trim", "--kept", "0,1,5", tmp_path / "base", tmp_path / "trimmed")
    fast = ("--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 2, "--warmup", 0, "--device", "cpu")
    report = LatencyReport.from_dict(json.loads(run("bench", tmp_path / "trimmed", *fast, "--batch-size", 2, "--json")))
    assert (report.base_sizes.num_layers, report.sizes.num_layers) == (6, 3) and report.runs[0].batch_size == 2
    shown = run("bench", tmp_path / "trimmed", *fast, "--out", tmp_path / "report.json")
    assert "by weight bytes" in shown and "tokens/s" in shown
    assert LatencyReport.from_json(tmp_path / "report.json").settings["prompt_tokens"] == 4
    assert json.loads(run("bench", tmp_path / "trimmed", *fast, "--alone", "--json"))["base_runs"] == []
    assert "Expected new_tokens of at least 2" in run("bench", tmp_path / "trimmed", "--new-tokens", 1, code=1)


def test_card_writes_and_says_what_is_missing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    run("trim", "--kept", "0,1,5", tmp_path / "base", tmp_path / "trimmed")
    arguments = ("card", tmp_path / "trimmed", "--no-measure", "--domain", "invented words", "--license", "mit")
    plain = json.loads(run(*arguments, "--json"))
    text = Path(plain["card"]).read_text()
    assert "fine-tuned for invented words" in text and "license: mit" in text
    assert "latency" in plain["missing"] and "a domain (--domain)" not in plain["missing"]
    assert "lacks quality in the domain" in run("card", tmp_path / "trimmed", "--no-measure")
    assert "Expected a trimmed model" in run("card", tmp_path / "base", code=1)


def test_inspect_of_what_is_no_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert "error:" in run("inspect", tmp_path, code=1)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["trim"] = {"version": 1, "base_num_layers": 10**12, "kept_layers": [0, 1, 2, 3, 4, 5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Expected base_num_layers of at most" in run("inspect", tmp_path, "--json", code=1)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    said = run("inspect", tmp_path, code=1)
    assert f"Expected {len(whole):,} bytes" in said and f"got {len(whole) - 100:,}" in said
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1044992\n")
    assert "a pointer of Git LFS. Fetch" in run("inspect", tmp_path, code=1)
    assert "a pointer of Git LFS. Fetch" in run("trim", tmp_path, tmp_path / "out", "--kept", "0,1", code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["inspect"], ["trim", "--kept", "0,1"], ["doctor"]])
def test_a_name_that_is_no_model_is_said(command: list[str], tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    out = [str(tmp_path / "out")] if command[0] == "trim" else []
    names = {
        str(tmp_path / "absent"): "there is no such folder",
        "~/x": "there is no such folder",
        "https://huggingface.co/org/model": "got the address https://huggingface.co/org/model",
    }
    if command != ["doctor"]:  # which needs no more than a config
        names[str(tmp_path / "config.json")] = "Give the folder that it is in"
    for name, said in names.items():
        found = run(*command, name, *out, code=1).replace("\n", " ")
        assert "Expected a model's folder, or its id on the Hub" in found and said in found


def test_a_list_of_layers_to_drop_is_read_to_the_letter(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    assert "got [1] more than once" in run("trim", tmp_path / "base", tmp_path / "out", "--drop", "1,0-2", code=1)
    assert "at least one of the 6 layers" in run("trim", tmp_path / "base", tmp_path / "out", "--drop", "0-5", code=1)
    assert not (tmp_path / "out").exists()


def test_as_a_module_it_exits_with_the_same_status() -> None:
    command = [sys.executable, "-m", "trimllm_hf.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "inspect" in done.stdout
    done = subprocess.run([*command, "trim", "a", "b"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "exactly one of" in done.stderr


def test_inspect_shows_the_layers_that_an_adapter_belongs_to(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "full")
    assert "Inspect its base" in run("inspect", tmp_path / "full", code=1)
    drop_layers(model, [1, 4])
    model.save_pretrained(tmp_path / "trimmed")
    plain = json.loads(run("inspect", tmp_path / "trimmed", "--json"))
    assert plain["model_type"] == "LORA adapter" and plain["dropped_layers"] == [1, 4] and plain["trimmed"]
    assert "█░██░█" in run("inspect", tmp_path / "trimmed")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_answer_is_not_lost_to_the_encoding_of_a_terminal(
    trimmed: tuple[Path, PreTrainedModel], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trimmed
    monkeypatch.setenv("COLUMNS", "120")
    for more in ([], ["--json"], ["--help"]):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # strict, as Python opens stdout
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", terminal)
            app(["inspect", str(folder), *more], prog_name="trimllm")
        assert not end.value.code
        terminal.flush()
        shown = terminal.buffer.getvalue().decode(encoding)
        if more == ["--json"]:
            assert json.loads(shown)["strip"] == "█░██░█"
        elif not more:
            assert ("█░██░█" if encoding == "utf-8" else "#.##.#") in shown
        else:
            assert "--what-if" in shown
