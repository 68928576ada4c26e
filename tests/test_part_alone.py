"""Classes that have one part of a trimmed encoder-decoder alone: T5's encoder, BART's decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tokens
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from trimllm_hf import LayerMap, drop_layers


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    layers = {"encoder_layers": 6, "decoder_layers": 5, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": 97, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**layers, **sizes, init_std=0.2)).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(num_layers=6, num_decoder_layers=5, **sizes)).eval()


def test_an_encoder_of_a_trimmed_decoder_is_whole(tmp_path: Path) -> None:
    model = t5()
    drop_layers(model, [1, 3], part="decoder")
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path).eval()
    assert LayerMap.from_config(encoder.config).kept_layers == tuple(range(6))
    assert drop_layers(encoder, [2]).kept_layers == (0, 1, 3, 4, 5)
    encoder.save_pretrained(tmp_path / "encoder")
    again = T5EncoderModel.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).last_hidden_state, encoder(tokens()).last_hidden_state)
    assert len(again.encoder.block) == 5


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_decoder_alone_has_the_map_of_its_own_layers_only(part: str, tmp_path: Path) -> None:
    model = bart()
    drop_layers(model, [1], part=part)
    model.save_pretrained(tmp_path)
    decoder = BartForCausalLM.from_pretrained(tmp_path)
    kept = (0, 2, 3, 4) if part == "decoder" else (0, 1, 2, 3, 4)
    found = LayerMap.from_config(decoder.config)
    assert (found.kept_layers, found.part) == (kept, None)
    assert drop_layers(decoder, [0]).kept_layers == kept[1:]
    assert len(decoder.model.decoder.layers) == len(kept) - 1
