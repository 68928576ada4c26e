"""A trimmed folder is loaded as what it is, whichever way its class is named, and at no other depth than it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from trimllm_hf import LayerMap, drop_layers


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens())[0]


@pytest.fixture(scope="module")
def without_halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("halves")
    model = tiny_model()
    drop_layers(model, [3, 8], unit="sublayer")
    model.save_pretrained(folder)
    return folder


def test_a_stock_class_that_is_named_outright_builds_what_the_folder_holds(without_halves: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(without_halves)
    for found in (
        LlamaForCausalLM.from_pretrained(without_halves),
        LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=without_halves, dtype=torch.float32),
        LlamaForCausalLM.from_pretrained(without_halves, config=AutoConfig.from_pretrained(without_halves)),
        getattr(transformers, AutoConfig.from_pretrained(without_halves).architectures[0]).from_pretrained(without_halves),
    ):
        assert type(found) is type(expected)
        torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)
    body = LlamaModel.from_pretrained(without_halves)
    torch.testing.assert_close(logits(body), logits(AutoModel.from_pretrained(without_halves)), rtol=0, atol=0)


def test_trl_builds_it_from_a_path(without_halves: Path) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    found = utils.create_model_from_path(str(without_halves))
    torch.testing.assert_close(logits(found), logits(AutoModelForCausalLM.from_pretrained(without_halves)), rtol=0, atol=0)


def test_a_class_of_another_architecture_fails_as_ever(without_halves: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no_such_argument"):
        LlamaForCausalLM.from_pretrained(tmp_path, no_such_argument=1)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trimmed")
    model = tiny_model()
    drop_layers(model, [1, 3])
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("depth", [2, 6])
def test_another_depth_is_refused_when_it_is_asked_for(depth: int, trimmed: Path) -> None:
    expected = rf"at the depth that it has.*depth of {depth}, got 4.*drop_layers.*Nothing was loaded"
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=expected):
            load(trimmed, num_hidden_layers=depth)
    config = AutoConfig.from_pretrained(trimmed)
    config.num_hidden_layers = depth
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match=expected):
            kind.from_pretrained(trimmed, config=config)


def test_another_depth_under_the_fields_other_name_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    drop_layers(model, [1])
    model.save_pretrained(tmp_path)
    for name in ("n_layer", "num_hidden_layers"):
        with pytest.raises(ValueError, match="at the depth that it has"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **{name: 2})


def test_other_settings_are_taken_as_ever(trimmed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trimmed, num_hidden_layers=4, use_cache=False, attention_dropout=0.25)
    assert model.config.attention_dropout == 0.25 and LayerMap.from_config(model.config).kept_layers == (0, 2, 4, 5)
