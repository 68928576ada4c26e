"""Models that are not plain transformers models: trimmed inside what wraps them, or refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_surgery import assert_same, snapshot
from tiny import tiny_model, tokens
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from trimllm_hf import LayerMap, drop_layers, score_layers
from trimllm_hf.surgery.blocks import find_blocks

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}


class Around(nn.Module):
    """A user's own module around an encoder."""

    def __init__(self, encoder: PreTrainedModel, shows_config: bool) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(32, 2)
        if shows_config:
            self.config = encoder.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids).last_hidden_state[:, 0])


class WithArguments(BertPreTrainedModel):
    """A user's model whose `__init__` takes more than a config."""

    def __init__(self, config: Any, num_tags: int) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.tags = nn.Linear(32, num_tags)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.tags(self.bert(input_ids).last_hidden_state)


class MoreArguments(transformers.BertForSequenceClassification):
    """The same, on top of a model that does not."""

    def __init__(self, config: Any, weight: float) -> None:
        super().__init__(config)
        self.weight = weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).logits * self.weight


class OnePerLayer(WithArguments):
    def __init__(self, config: Any, num_tags: int) -> None:
        super().__init__(config, num_tags)
        self.gates = nn.ModuleList(nn.Linear(2, 2) for _ in range(config.num_hidden_layers))


class LoadsItself(BertPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel.from_pretrained(config.encoder)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = tiny_model(), tiny_model()


def skipped(model: nn.Module, blocks: nn.ModuleList, layers: list[int]) -> torch.Tensor:
    handles = [blocks[i].register_forward_hook(lambda _, args, output: args[0]) for i in layers]
    with torch.no_grad():
        found = model(tokens())
    for handle in handles:
        handle.remove()
    return found


MODELS = {
    "a module around an encoder": lambda: Around(BertModel(BertConfig(**SIZES)), shows_config=False),
    "one that shows the config": lambda: Around(BertModel(BertConfig(**SIZES)), shows_config=True),
    "arguments beside the config": lambda: WithArguments(BertConfig(**SIZES), 5),
    "more arguments than its parent": lambda: MoreArguments(BertConfig(**SIZES), 2.0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_layers_go_inside_what_wraps_them(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    bert = next(module for module in model.modules() if isinstance(module, BertModel))
    expected, full = skipped(model, bert.encoder.layer, [1, 3]), skipped(model, bert.encoder.layer, [])
    assert drop_layers(model, [1, 3]).kept_layers == (0, 2, 4, 5)
    assert len(bert.encoder.layer) == bert.config.num_hidden_layers == 4
    torch.testing.assert_close(skipped(model, bert.encoder.layer, []), expected, rtol=0, atol=0)
    assert not torch.equal(expected, full)


def test_a_class_with_more_arguments_is_loaded_as_ever(tmp_path: Path) -> None:
    model = WithArguments(BertConfig(**SIZES), 5).eval()
    drop_layers(model, [2])
    model.save_pretrained(tmp_path)
    again = WithArguments.from_pretrained(tmp_path, num_tags=5).eval()
    assert LayerMap.from_config(again.config).kept_layers == (0, 1, 3, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=0)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    model = OnePerLayer(BertConfig(**SIZES), 5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"whose own 'gates' has 6 items.*Nothing was changed"):
        drop_layers(model, [1])
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"got 2: \['query', 'passage'\].*model.query"):
        drop_layers(Two(), [1])
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    loads = LoadsItself(BertConfig(**SIZES, encoder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"LoadsItself, whose __init__ loads weights.*Nothing was changed"):
        drop_layers(loads, [1])
    assert len(find_blocks(loads)) == 6


def test_a_wrapped_model_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what needs no batch: the rest is a matter of the wrapper's own inputs."""
    model = Around(BertModel(BertConfig(**SIZES)), shows_config=False)
    assert score_layers(model.encoder, [], "last").shape == (6,)


def test_a_parametrized_convolution_is_no_other_kind() -> None:
    config = Wav2Vec2Config(
        **{**SIZES, "vocab_size": 32}, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2Model(config).eval()
    audio = torch.randn(1, 400)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return model(audio).last_hidden_state

    handles = [
        model.encoder.layers[i].register_forward_hook(lambda _, a, out: (a[0], *out[1:]) if isinstance(out, tuple) else a[0])
        for i in (1, 4)
    ]
    expected = hidden()
    for handle in handles:
        handle.remove()
    assert not torch.equal(expected, hidden())
    drop_layers(model, [1, 4])
    torch.testing.assert_close(hidden(), expected, rtol=0, atol=0)
