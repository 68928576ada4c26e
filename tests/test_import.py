"""`import trimllm_hf` is cheap: names come from their files when they are first used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trimllm_hf

ROOT = Path(__file__).resolve().parents[1]


def test_each_name_is_found_in_its_file_and_nowhere_else() -> None:
    tree = ast.parse((ROOT / "trimllm_hf" / "__init__.py").read_text())
    imported = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }  # fmt: skip
    assert imported == trimllm_hf._FILES, "what a type checker sees differs from what Python imports"
    assert sorted(imported) == trimllm_hf.__all__
    for name, file in imported.items():
        found = getattr(trimllm_hf, name)
        assert found.__module__ == f"trimllm_hf.{file}" and name in dir(trimllm_hf)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TrimTrainr'"):
        _ = trimllm_hf.TrimTrainr


def test_the_import_loads_neither_torch_nor_the_trainer() -> None:
    code = "import sys, trimllm_hf; print([name for name in ('torch', 'transformers.trainer') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("stack", "surgery.blocks", {"find_stack": "find_blocks", "find_sublayers": "find_sublayers"}),
        ("publish.run", "training.run_summary", {"describe_run": "describe_run"}),
    ],
)
def test_an_old_path_warns_and_names_the_new_one(
    old: str, new: str, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"trimllm_hf.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"trimllm_hf\.{old} is trimllm_hf\.{new} now"):
        found = import_module(f"trimllm_hf.{old}")
    monkeypatch.delitem(sys.modules, f"trimllm_hf.{old}")
    for name, now in names.items():
        assert getattr(found, name) is getattr(import_module(f"trimllm_hf.{new}"), now)
