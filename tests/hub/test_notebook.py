"""The notebook, from top to bottom, with a Hub of this machine to push to; and nothing in it that was not run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ALICE, ROOT, Place, environment
from nbformat import read

NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
RUN = """
import sys
from nbclient import NotebookClient
from nbformat import read, write
path = sys.argv[1]
notebook = read(path, 4)
NotebookClient(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
write(notebook, path)
"""


def text_of(path: Path) -> str:
    """All that the cells printed."""
    outputs = [output for cell in read(path, 4).cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(place: Place, tmp_path: Path) -> None:
    """It needs the recipes beside it and no network; the trimmed model is far above chance, and arrives on the Hub."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / NOTEBOOK.name
    shutil.copyfile(NOTEBOOK, copy)
    env = environment(place.hub, tmp_path / "home", HF_TOKEN=ALICE, TRIMLLM_PUSH_TO="alice/quickstart", OMP_NUM_THREADS="1")
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-c", RUN, str(copy), str(copy.parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = text_of(copy)
    accuracy, error = map(float, re.findall(r"trimmed and fine-tuned: ([\d.]+) ± ([\d.]+)", printed)[0])
    assert accuracy - 4 * error > 0.25 and "logits equal: True" in printed
    sent = place.hub.files("alice/quickstart")
    assert {"model.safetensors", "config.json", "README.md"} <= set(sent)
    config = json.loads((copy.parent / "runs/quickstart/config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 6


def test_the_notebooks_outputs_are_those_of_a_run() -> None:
    """All cells in order, none with an error, and nothing of a machine."""
    cells = [cell for cell in read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"(^|[\s\"'=(])/(?!>)[\w.-]+/", text_of(NOTEBOOK))
    assert "times as fast; by weight bytes" in text_of(NOTEBOOK)
