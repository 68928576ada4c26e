"""A trimmed checkpoint by files: all that loading needs goes along, and it lands where it was asked for, or nowhere."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from trimllm_hf import drop_layers, load_kept_layers, write_kept_layers
from trimllm_hf.cli import app
from trimllm_hf.loading import trimmed_folder

KEPT, DROPPED = [0, 2, 3, 5], [1, 4]
GO_ALONG = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "special_tokens_map.json": "{}", "vocab.txt": "a\nb\n",
    "merges.txt": "a b\n", "spiece.model": "\x0a\x07", "chat_template.jinja": "{{ x }}", "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}", "processor_config.json": "{}", "additional_chat_templates/tool.jinja": "{{ y }}",
    "LICENSE": "free", "NOTICE": "by", "USE_POLICY.md": "be kind", "modules.json": '[{"idx": 0, "path": ""}]',
    "sentence_bert_config.json": "{}", "1_Pooling/config.json": '{"pooling": "mean"}', "params.json": "{}",
}  # fmt: skip
STAY = [
    "pytorch_model.bin", "consolidated.00.pth", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "training_args.bin", "model.onnx", "ggml.gguf", "README.md", "tf_model.h5", "plain.json.pkl", "code.py",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    for name, text in GO_ALONG.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in STAY:
        (folder / name).write_text("left behind")
    for name in ("checkpoint-5", "runs", ".cache", "onnx"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "harmless.json").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": 1}, folder / "harmless.txt")
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_neither_weights_nor_a_runs_goes_along_byte_by_byte(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.INFO, logger="transformers.trimllm_hf"):
        write_kept_layers(base, KEPT, tmp_path / "out")
    out = tmp_path / "out"
    assert files_below(out) == {*GO_ALONG, "config.json", "model.safetensors", "generation_config.json"}
    assert {name: (out / name).read_bytes() for name in GO_ALONG} == {n: t.encode() for n, t in GO_ALONG.items()}
    said = next(record.getMessage() for record in caplog.records if "Not copied" in record.getMessage())
    for name in (*STAY, "harmless.json", "harmless.txt", "checkpoint-5/", "runs/", "onnx/"):
        assert name in said


def test_the_weights_of_modules_around_a_model_go_along(base: Path, tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    for name in ("2_Dense", "fp16"):
        (base / name).mkdir()
        save_file({"linear.weight": torch.ones(2)}, base / name / "model.safetensors")
    write_kept_layers(base, KEPT, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "fp16").exists()


def test_a_hub_models_files_go_along_without_network(base: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "cache" / "models--org--base" / "snapshots" / commit
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    write_kept_layers("org/base", KEPT, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert files_below(tmp_path / "out") >= GO_ALONG.keys()


OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import SCALE

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
""",
    "helper_own.py": "SCALE = 3.0\n",
}


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with code of its own."""
    folder = tmp_path / "own"
    tiny_model().save_pretrained(folder)
    for name, text in OWN_CODE.items():
        (folder / name).write_text(text)
    plain = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    plain |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def test_code_goes_along_and_runs_only_with_consent(with_code: Path, tmp_path: Path) -> None:
    for call in (load_kept_layers, lambda base, kept: write_kept_layers(base, kept, tmp_path / "out")):
        with pytest.raises(ValueError, match="trust_remote_code"):
            call(with_code, KEPT)
    refused = CliRunner().invoke(app, ["trim", "--drop", "1,4", str(with_code), str(tmp_path / "out")])
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    line = ["trim", "--trust-remote-code", "--drop", "1,4", str(with_code), str(tmp_path / "out")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert files_below(tmp_path / "out") >= OWN_CODE.keys()
    expected = tiny_model()
    drop_layers(expected, DROPPED)
    torch.save(tokens(), tmp_path / "ids")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in ("out", "ids", "logits"))]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), expected(tokens()).logits * 3)


def loads(folder: Path) -> bool:
    return len(AutoModelForCausalLM.from_pretrained(folder).model.layers) == len(KEPT)


@pytest.mark.parametrize("where", ["new", "deep", "empty", "current", "link", "trailing"])
def test_it_lands_in_any_new_or_empty_folder(base: Path, tmp_path: Path, where: str, monkeypatch: Any) -> None:
    real = tmp_path / "real"
    out = {"deep": real / "a" / "b", "link": tmp_path / "link", "trailing": Path(f"{real}/")}.get(where, real)
    if where != "new":
        real.mkdir()
    if where == "link":
        out.symlink_to(real)
    if where == "current":
        monkeypatch.chdir(real)
        out = Path(".")
    before = real.stat().st_ino if real.exists() else None
    write_kept_layers(base, KEPT, out)
    assert loads(out) and not list(Path(out).glob(".trimllm*")) and not list(tmp_path.glob("*.unfinished"))
    assert before in (None, real.stat().st_ino), "the folder was exchanged: a mount could not be"


def test_a_folder_of_the_users_beside_it_stays(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("precious")
    write_kept_layers(base, KEPT, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "precious"


def test_what_a_killed_run_left_is_taken_for_nothing(base: Path, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".trimllm_unfinished"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    write_kept_layers(base, KEPT, tmp_path / "out")
    assert loads(tmp_path / "out")


@pytest.mark.parametrize("error", [SafetensorError("No space left on device (os error 28)"), OSError(28, "No space left")])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, error: Exception, there: bool, monkeypatch: Any) -> None:
    out = tmp_path / "below" / "out"
    if there:
        out.mkdir(parents=True)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(trimmed_folder, "save_file", full)
    done = CliRunner().invoke(app, ["trim", "--drop", "1,4", str(base), str(out)])
    assert done.exit_code == 1 and "No space left" in done.output and "Traceback" not in done.output
    assert out.exists() == there and (not there or not any(out.iterdir()))
    assert out.parent.exists() == there


def test_too_little_room_is_said_before_the_work(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trimmed_folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(trimmed_folder, "save_file", lambda *_, **__: pytest.fail("it wrote"))
    with pytest.raises(OSError, match=r"Expected .* of room for the weights .*, got 1 bytes"):
        write_kept_layers(base, KEPT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_found_before_all_else(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(trimmed_folder, "plan_kept_layers", lambda *_: pytest.fail("the base was read"))
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OSError, match=f"Expected a folder that can be written to, got '{out}' .*Name another"):
            write_kept_layers(base, KEPT, out)
    with pytest.raises(ValueError, match="new or empty folder"):
        write_kept_layers(base, KEPT, tmp_path / "file")


def test_layers_that_leave_the_pattern_are_refused_where_it_has_to_be_portable(tmp_path: Path) -> None:
    tiny_model("gemma3_text", num_hidden_layers=12).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"pattern of Gemma3TextConfig.*Drop whole periods"):
        write_kept_layers(tmp_path / "base", [0, 2, 4, 5, 7, 9, 11], tmp_path / "out", portable=True)
    assert not (tmp_path / "out").exists()
    line = ["trim", "--portable", "--kept", "0-5,7,8", str(tmp_path / "base"), str(tmp_path / "out")]
    assert CliRunner().invoke(app, line).exit_code == 0
    for kept in ([*range(6)], [0, *range(7, 12)], [*range(11)]):
        write_kept_layers(tmp_path / "base", kept, tmp_path / f"out{len(kept)}-{kept[1]}", portable=True)
