"""`LayerMap`: what it accepts, how it composes, and that nothing in a file is trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from trimllm_hf import LayerMap, trim_like
from trimllm_hf.layer_map.base_check import logger

GOOD = LayerMap(6, (0, 1, 2, 3, 4, 5), base_model="org/base").drop([1], 3, "sensitivity", [0.5]).drop([2, 0], 6)


def test_it_composes_in_the_base_numbering_and_keeps_its_history() -> None:
    assert GOOD.kept_layers == (2, 4, 5) and GOOD.dropped_layers == (0, 1, 3)
    assert [record.dropped for record in GOOD.history] == [(1,), (0, 3)]
    assert GOOD.history[0].scores == (0.5,) and GOOD.history[0].step == 3


def test_it_survives_json_and_a_config(tmp_path: Path) -> None:
    assert LayerMap.from_dict(json.loads(json.dumps(GOOD.to_dict()))) == GOOD
    config = LlamaConfig(num_hidden_layers=3)
    config.trim = GOOD.to_dict()
    config.save_pretrained(tmp_path)
    assert LayerMap.from_config(LlamaConfig.from_pretrained(tmp_path)) == GOOD


def test_an_untrimmed_config_keeps_everything() -> None:
    assert LayerMap.from_config(LlamaConfig(num_hidden_layers=3)).kept_layers == (0, 1, 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**18) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(GOOD.to_dict())), value=JSON)
def test_a_damaged_map_is_one_clear_error_or_a_valid_map(field: str, value: Any) -> None:
    config = LlamaConfig(num_hidden_layers=3)
    config.trim = {**GOOD.to_dict(), field: value}
    try:
        layer_map = LayerMap.from_config(config)
    except ValueError as error:
        assert "Expected" in str(error) and len(str(error)) < 1000
        return
    assert layer_map.num_layers == 3 and 0 <= layer_map.kept_layers[0] <= layer_map.kept_layers[-1]
    assert layer_map.kept_layers[-1] < layer_map.base_num_layers


@given(value=JSON)
def test_any_other_value_is_refused(value: Any) -> None:
    config = LlamaConfig(num_hidden_layers=3)
    if value is None:
        return
    config.trim = value
    with pytest.raises(ValueError, match="Expected"):
        LayerMap.from_config(config)


def test_a_map_that_contradicts_the_depth_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=4)
    config.trim = GOOD.to_dict()
    with pytest.raises(ValueError, match="config's depth of 4, got 3"):
        LayerMap.from_config(config)


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(num_hidden_layers=6)
    config.save_pretrained(tmp_path)
    state = {"stateful_callbacks": {"TrimCallback": {"attributes": {"layer_map": GOOD.to_dict()}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="agree with itself"):
        LayerMap.from_checkpoint(tmp_path)


def test_trim_like_wants_a_base_that_has_the_layers(tmp_path: Path) -> None:
    from tiny import tiny_model

    state = {"stateful_callbacks": {"TrimCallback": {"attributes": {"layer_map": GOOD.to_dict()}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    model = tiny_model()
    assert trim_like(model, tmp_path).kept_layers == (2, 4, 5)
    assert trim_like(model, tmp_path).kept_layers == (2, 4, 5)  # it has them already: nothing to drop
    with pytest.raises(ValueError, match="base model of 6 layers, got one of 5"):
        trim_like(tiny_model(num_hidden_layers=5), tmp_path)
    wrong = LayerMap(6, (0, 1, 2, 3, 4, 5)).drop([5])
    model = tiny_model(num_hidden_layers=5)
    model.config.trim = wrong.to_dict()
    with pytest.raises(ValueError, match=r"still has the base's layers \[5\]"):
        trim_like(model, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        trim_like(model, tmp_path / "nowhere")


def test_layers_of_another_base_are_refused() -> None:
    ours = LayerMap(6, tuple(range(6)), base_model="org/one", base_revision="a" * 40)
    theirs = LayerMap(6, (0, 2, 3, 4, 5), base_model="org/other", base_revision="b" * 40)
    with pytest.raises(ValueError, match=r"Expected a model of the base 'org/other'.*got one of 'org/one'"):
        ours.positions_to_drop(theirs)
    for same in (replace(theirs, base_model="org/one"), replace(theirs, base_model=None)):
        assert ours.positions_to_drop(same) == [1]


def test_a_base_under_another_path_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ours = LayerMap(6, tuple(range(6)), base_model="/models/one")
    theirs = LayerMap(6, (0, 2, 3, 4, 5), base_model="org/other", base_revision="b" * 40)
    logger.addHandler(caplog.handler)
    try:
        assert ours.positions_to_drop(theirs) == [1]
    finally:
        logger.removeHandler(caplog.handler)
    assert "'org/other'" in caplog.text and "'/models/one'" in caplog.text
