"""A push of a sliced model: what arrives, and who can load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Place
from safetensors.torch import load_file, save_file
from sliced import calibration, model_to_slice
from test_push import load, logits

from trimllm_hf import slice_model, write_remote_code
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.model_check import check_model

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


def test_with_code_beside_them_they_are_checked_all_the_same(sliced: Path) -> None:
    write_remote_code(sliced)
    assert check_model(contents_of(sliced)).num_layers == 6
    state = load_file(sliced / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"][:, 1:].contiguous()
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"exactly the widths in config\.slicing, got 1 mismatched_keys"):
        check_model(contents_of(sliced))


def test_weights_of_other_widths_are_not_pushed(place: Place, sliced: Path) -> None:
    config = json.loads((sliced / "config.json").read_text())
    config["slicing"]["per_layer_config"]["2"]["hidden_size"] -= 1
    (sliced / "config.json").write_text(json.dumps(config))
    done = place.client.push(sliced, "alice/wrong-widths")
    assert done.error == "ValueError" and "alice/wrong-widths" not in place.hub.store.repos


@pytest.mark.slow
def test_it_loads_with_the_package_or_its_code_and_fails_loudly_without(place: Place, sliced: Path, tmp_path: Path) -> None:
    write_remote_code(sliced)
    done = place.client.push(sliced, "alice/narrow")
    assert not hasattr(done, "error"), done
    for how in ("package", "code"):
        result = load(place, "alice/narrow", tmp_path / how, how=how)
        assert result.returncode == 0, result.stderr
        assert torch.equal(torch.load(tmp_path / how), logits(sliced))
    stock = load(place, "alice/narrow", tmp_path / "stock")
    assert stock.returncode != 0 and "pass the argument `trust_remote_code=True`" in stock.stderr
