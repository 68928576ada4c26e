"""The Trainer's own arguments: `push_to_hub=True` and what is pushed at saves (`hub_strategy`)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ALICE, ROOT, Place, environment

from trimllm_hf import LayerMap
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.model_check import check_model

pytestmark = pytest.mark.hub


@pytest.mark.parametrize(
    "strategy",
    ["every_save", *(pytest.param(name, marks=pytest.mark.slow) for name in ("end", "checkpoint", "all_checkpoints"))],
)
def test_a_trainer_publishes(place: Place, tmp_path: Path, strategy: str) -> None:
    """Its own pushes at saves go on; the last is ours: checked, whole, without pickles, tagged."""
    hub, name = place.hub, f"alice/by-{strategy.replace('_', '-')}"
    env = environment(hub, tmp_path / "home", HF_TOKEN=ALICE)
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, Path(__file__).with_name("train.py"), tmp_path / "out", name, strategy]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("hub_token is part of the arguments" in done.stderr) == (strategy == "checkpoint")
    first, second = re.search(r"first: (\w+)", done.stdout), re.search(r"second: (\w+)", done.stdout)
    assert first and second and first[1] == second[1], done.stdout
    last, *earlier = hub.history(name)
    assert last == "End of training"
    # In the background: by then the next save may have changed the files, and its own push finds nothing new.
    assert any(title.startswith("Training in progress, step") for title in earlier) == (strategy != "end"), earlier
    refs = hub.refs(name)
    assert refs["refs/tags/trim-4of6"] == refs["refs/heads/main"] == first[1]
    held = hub.files(name)
    at_top = {path for path in held if "/" not in path}
    assert "README.md" in at_top and not [path for path in at_top if path.endswith((".bin", ".pt", ".pth"))]
    folders = {path.split("/")[0] for path in held} - at_top
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4", "checkpoint-6"}}
    assert folders == expected.get(strategy, set())
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for path in at_top:
        (pushed / path).write_bytes(held[path])
    layer_map = check_model(contents_of(pushed))
    assert layer_map == LayerMap.from_checkpoint(tmp_path / "out") and layer_map.num_layers == 4
