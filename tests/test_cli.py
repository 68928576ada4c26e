"""The command line: what it prints, for people and for machines, and the exit status that a script can trust."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model
from transformers import PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

from trimllm_hf import drop_layers
from trimllm_hf.cli import app

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
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
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


def test_inspect_of_what_is_no_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert "error:" in run("inspect", tmp_path, code=1)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["trim"] = {"version": 1, "base_num_layers": 10**12, "kept_layers": [0, 1, 2, 3, 4, 5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Expected base_num_layers of at most" in run("inspect", tmp_path, "--json", code=1)


def test_as_a_module_it_exits_with_the_same_status() -> None:
    command = [sys.executable, "-m", "trimllm_hf.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "inspect" in done.stdout
    done = subprocess.run([*command, "inspect", "/nowhere/at/all"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("error:") == 1
