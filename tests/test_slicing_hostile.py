"""What a damaged or hostile repository may say of widths: one clear error, or the right model; never much memory."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sliced import calibration, model_to_slice
from test_hostile_configs import HUGE, numbers, values
from tiny import tokens
from transformers import AutoModelForCausalLM

from trimllm_hf import SliceMap, slice_model
from trimllm_hf.layer_map import MOST_LAYERS
from trimllm_hf.slicing.slice_map import MOST_WIDTH

TRUE = SliceMap(32, (32, 28, 24, 22, 19, 19), ratio=0.25, allocation="redundancy", spread=1.0, tokens=180).to_dict()
entries = st.one_of(values, st.fixed_dictionaries({"hidden_size": numbers}))
FIELDS = {
    "version": values,
    "what": st.one_of(values, st.sampled_from(["hidden", "mlp"])),
    "hidden_size": numbers,
    "intermediate_size": numbers,
    "per_layer_config": st.one_of(values, st.dictionaries(st.sampled_from("0123456"), entries, max_size=7)),
    "ratio": values,
    "allocation": values,
    "spread": values,
    "mean": values,
    "redundancy": st.one_of(values, st.lists(numbers, max_size=7)),
    "tokens": values,
    "base_model": values,
    "another": values,
}


@st.composite
def changed_maps(draw: Any) -> Any:
    """A true map with some fields changed, left out or added; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    changed = json.loads(json.dumps(TRUE))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            changed.pop(name, None)
        else:
            changed[name] = draw(FIELDS[name])
    if draw(st.booleans()) and isinstance(changed.get("per_layer_config"), dict):
        changed["per_layer_config"] = {**TRUE["per_layer_config"], draw(st.sampled_from("0356")): draw(entries)}
    return changed


@settings(max_examples=300, deadline=None)
@given(plain=changed_maps())
@example(plain={**TRUE, "hidden_size": HUGE})
@example(plain={**TRUE, "per_layer_config": {"0": {"hidden_size": 10**400}}})
@example(plain={**TRUE, "per_layer_config": {"1": {"hidden_size": 16}}})
@example(plain={**TRUE, "per_layer_config": {str(n): {"hidden_size": 8} for n in range(MOST_LAYERS + 1)}})
def test_a_map_is_read_as_written_or_refused(plain: Any) -> None:
    try:
        found = SliceMap.from_dict(plain)
    except ValueError as error:
        assert str(error).startswith("Expected ") and len(str(error)) < 700
        return
    assert SliceMap.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert 1 <= found.num_layers <= MOST_LAYERS and all(8 <= width <= found.width <= MOST_WIDTH for width in found.widths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = model_to_slice()
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    path = tmp_path_factory.mktemp("sliced")
    model.save_pretrained(path)
    return path


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain=changed_maps())
@example(plain={**TRUE, "per_layer_config": {str(n): {"hidden_size": 16} for n in range(6)}})
@example(plain={**TRUE, "per_layer_config": {str(n): {"hidden_size": 32} for n in range(6)}})
@example(plain={**TRUE, "per_layer_config": {str(n): {"hidden_size": 16} for n in range(4)}})
@example(plain={**TRUE, "hidden_size": MOST_WIDTH})
def test_a_model_loads_as_it_was_or_not_at_all(folder: Path, tmp_path_factory: pytest.TempPathFactory, plain: Any) -> None:
    target = tmp_path_factory.getbasetemp() / "hostile-sliced"
    if not target.exists():
        shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "slicing": plain}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = AutoModelForCausalLM.from_pretrained(target)
    except (ValueError, RuntimeError) as error:  # transformers' own is of weights of other sizes
        assert "Expected " in str(error) or "ignore_mismatched_sizes" in str(error)
    else:
        right = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, right(tokens()).logits)
        found, own = SliceMap.from_config(model.config), SliceMap.from_config(right.config)
        assert found is not None and own is not None and found.widths == own.widths
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
