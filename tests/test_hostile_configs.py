"""What a damaged or hostile repository may say of its layers: one clear error, or the right model; never much memory."""

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
from tiny import tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from trimllm_hf import LayerMap, drop_layers, trim_like
from trimllm_hf.layer_map import MOST_LAYERS

HUGE = 10**12
numbers = st.one_of(
    st.integers(-3, 12), st.sampled_from([HUGE, -HUGE, 10**400, MOST_LAYERS, MOST_LAYERS + 1]), st.booleans(), st.floats()
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
layers = st.one_of(values, st.lists(st.integers(0, 6), max_size=7), st.just(list(range(5))))
FIELDS = {
    "version": st.one_of(values, st.sampled_from([1, 2, True, 1.0, "1"])),
    "base_num_layers": values,
    "kept_layers": layers,
    "kept_attention": layers,
    "kept_mlp": layers,
    "unit": st.one_of(values, st.sampled_from(["block", "sublayer", "half"])),
    "part": values,
    "base_model": values,
    "base_revision": values,
    "history": st.one_of(values, st.lists(st.fixed_dictionaries({"dropped": values, "step": values}), max_size=3)),
    "another": values,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that lost blocks, and one that lost halves, on disk."""
    found = {}
    for unit, positions in (("block", [1, 3]), ("sublayer", [3, 4])):
        model = tiny_model()
        drop_layers(model, positions, unit=unit)
        found[unit] = tmp_path_factory.mktemp(unit)
        model.save_pretrained(found[unit])
    return found


@st.composite
def changed_maps(draw: Any, plain: dict[str, Any]) -> Any:
    """A true map with some fields changed, left out or added; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    changed = dict(plain)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            changed.pop(name, None)
        else:
            changed[name] = draw(FIELDS[name])
    return changed


TRUE = {
    unit: LayerMap(6, kept).drop(positions, unit=unit).to_dict()
    for unit, kept, positions in (("block", tuple(range(6)), [1, 3]), ("sublayer", tuple(range(6)), [3, 4]))
}
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(plain=st.one_of(changed_maps(TRUE["block"]), changed_maps(TRUE["sublayer"])))
@example(plain={**TRUE["block"], "base_num_layers": HUGE})
@example(plain={**TRUE["block"], "kept_layers": [0, 0, 1]})
@example(plain={**TRUE["sublayer"], "kept_mlp": [-1]})
@example(plain={**TRUE["block"], "version": 2})
def test_a_map_is_read_as_written_or_refused(plain: Any) -> None:
    try:
        layer_map = LayerMap.from_dict(plain)
    except ValueError as error:
        assert str(error).startswith("Expected ") and len(str(error)) < 700
        return
    again = LayerMap.from_dict(json.loads(json.dumps(layer_map.to_dict())))
    assert repr(again) == repr(layer_map)  # a score may be no number, which equals nothing
    assert 0 < layer_map.num_layers <= layer_map.base_num_layers <= MOST_LAYERS
    assert len(layer_map.dropped_layers) == layer_map.base_num_layers - layer_map.num_layers
    assert layer_map.num_layers <= len(layer_map.sublayers) <= 2 * layer_map.num_layers
    assert {layer for layer, _ in layer_map.sublayers} == set(layer_map.kept_layers)


def with_map(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder, with changes to its config.json."""
    if not target.exists():
        shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain=changed_maps(TRUE["sublayer"]))
@example(plain={**TRUE["sublayer"], "kept_attention": [0, 1, 2, 3, 4, 5]})  # a half more than the weights have
@example(plain={**TRUE["sublayer"], "kept_mlp": [0, 2, 3, 4]})  # one fewer
@example(plain={**TRUE["sublayer"], "kept_layers": [0, 1], "kept_attention": [0, 1], "kept_mlp": [0]})  # shallower
@example(plain={**TRUE["block"]})  # another unit, another depth
@example(plain=LayerMap(6, tuple(range(6))).to_dict())  # nothing gone
def test_a_model_without_halves_loads_as_it_was_or_not_at_all(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, plain: Any
) -> None:
    folder = with_map(folders["sublayer"], tmp_path_factory.getbasetemp() / "hostile-sublayer", trim=plain)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert "Expected " in str(error)
    else:
        right = AutoModelForCausalLM.from_pretrained(folders["sublayer"])
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, right(tokens()).logits)
        assert LayerMap.from_config(model.config).num_layers == 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"base_model_type": "no-such-type"},
            "a model type that transformers knows, got 'no-such-type'",
        ),
        ({"base_model_type": "trimllm"}, "base_model_type"),  # of itself, without end
        ({"base_model_type": None}, "base_model_type"),
        ({"base_model_type": ["llama"]}, "base_model_type"),
        ({"num_hidden_layers": 4}, r"config.trim to keep as many layers as the config's depth of 4, got 6"),
        ({"num_hidden_layers": HUGE}, "config.trim to keep as many layers"),
        ({"hidden_size": HUGE}, "."),
    ],
)
def test_a_config_around_the_map_that_contradicts_it(
    changes: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_map(folders["sublayer"], tmp_path / "it", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, RuntimeError), match=said):  # torch refuses a size that no tensor can have
        AutoModelForCausalLM.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@quick
@given(plain=changed_maps(TRUE["block"]))
@example(plain={**TRUE["block"], "kept_layers": [0, 2, 4]})
def test_a_model_without_blocks_is_never_trimmed_by_a_wrong_map(folders: dict[str, Path], plain: Any) -> None:
    """Stock transformers loads such a model by its depth; what reads the map reads it all or refuses."""
    config = AutoConfig.from_pretrained(folders["block"])
    assert config.trim == TRUE["block"] | {"base_model": None}
    config.trim = plain
    try:
        layer_map = LayerMap.from_config(config)
    except ValueError as error:
        assert str(error).startswith("Expected ")
    else:
        assert layer_map.num_layers == config.num_hidden_layers == 4 or plain is None


def test_a_hostile_checkpoint_does_not_trim_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_model()
    for number, kept in enumerate(([0, 1, 99], [5, 4], [], "all", [0, HUGE])):
        folder = with_map(folders["block"], tmp_path / str(number), trim={**TRUE["block"], "kept_layers": kept})
        with pytest.raises(ValueError, match="Expected kept_layers"):
            trim_like(model, folder)
    assert len(model.model.layers) == 6 and not hasattr(model.config, "trim")
