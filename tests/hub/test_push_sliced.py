"""A push of a sliced model: what arrives, and who can load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Place
from sliced import calibration, model_to_slice
from test_push import load, logits

from trimllm_hf import slice_model, write_remote_code

pytestmark = pytest.mark.hub


@pytest.fixture
def sliced(folder: Path) -> Path:
    """The finished folder with a sliced model in the place of its own."""
    for path in folder.glob("model*"):
        path.unlink()
    model = model_to_slice(seed=3)
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    model.save_pretrained(folder)
    return folder


def test_the_widths_arrive_and_name_the_commit(place: Place, sliced: Path) -> None:
    done = place.client.push(sliced, "alice/sliced")
    assert done.new and done.tag is None
    assert place.hub.history("alice/sliced")[0] == "6 of 6 layers, 25% of the hidden states cut"
    held = place.hub.files("alice/sliced")
    assert held["model.safetensors"] == (sliced / "model.safetensors").read_bytes()
    assert json.loads(held["config.json"])["slicing"] == json.loads((sliced / "config.json").read_text())["slicing"]


def test_weights_of_other_widths_are_not_pushed(place: Place, sliced: Path) -> None:
    config = json.loads((sliced / "config.json").read_text())
    config["slicing"]["per_layer_config"]["2"]["hidden_size"] -= 1
    (sliced / "config.json").write_text(json.dumps(config))
    done = place.client.push(sliced, "alice/wrong-widths")
    assert done.error == "ValueError" and "alice/wrong-widths" not in place.hub.store.repos


@pytest.mark.slow
def test_it_loads_with_the_package_or_its_code_and_fails_loudly_without(place: Place, sliced: Path, tmp_path: Path) -> None:
    write_remote_code(sliced)
    place.client.push(sliced, "alice/narrow")
    for how in ("package", "code"):
        result = load(place, "alice/narrow", tmp_path / how, how=how)
        assert result.returncode == 0, result.stderr
        assert torch.equal(torch.load(tmp_path / how), logits(sliced))
    stock = load(place, "alice/narrow", tmp_path / "stock")
    assert stock.returncode != 0 and "trimllm_sliced" in stock.stderr
