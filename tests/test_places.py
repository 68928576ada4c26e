"""What a model's own `forward` does at a layer's number: such a layer stays, and the others go exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_surgery import assert_same, snapshot
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RwkvConfig,
    RwkvForCausalLM,
)

from trimllm_hf import drop_layers
from trimllm_hf.surgery.blocks import find_blocks

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
IMAGE = 90  # the token that stands for a patch


def sees() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose first two text layers are handed features of an image, and such an image."""
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=91)
    model = Qwen3VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 91, IMAGE, IMAGE, IMAGE, IMAGE, 92, 7, 8]])
    return model, {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def convolves() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A DeBERTa with a convolution behind its first layer."""
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config(**SIZES, conv_kernel_size=3, type_vocab_size=0)).eval()
    return model, {"input_ids": torch.arange(5, 15)[None]}


def skipping(model: PreTrainedModel, layers: list[int], inputs: dict[str, Any]) -> torch.Tensor:
    """The model's result when layers hand on what they get."""
    blocks: nn.ModuleList = find_blocks(model).blocks
    handles = [blocks[i].register_forward_hook(lambda _, args, output: handed_on(args, output)) for i in layers]
    with torch.no_grad():
        result = model(**inputs)[0]
    for handle in handles:
        handle.remove()
    return result


def handed_on(args: Any, output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


@pytest.mark.parametrize(("make", "stays", "goes"), [(sees, 1, 2), (convolves, 0, 1)])
def test_a_layer_at_which_forward_does_something_stays(make: Any, stays: int, goes: int) -> None:
    model, inputs = make()
    full = skipping(model, [], inputs)
    trimmed = copy.deepcopy(model)
    drop_layers(trimmed, [goes, 4])
    expected = skipping(model, [goes, 4], inputs)
    torch.testing.assert_close(skipping(trimmed, [], inputs), expected, rtol=0, atol=0)
    assert not torch.allclose(full, expected)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"to stay, got \[{stays}\] to drop.*Nothing was changed"):
        drop_layers(model, [stays, 4])
    assert_same(before, snapshot(model))


def test_weights_that_are_scaled_by_their_number_are_refused() -> None:
    config = RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=6, rescale_every=2)
    model = RwkvForCausalLM(config).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Expected rescale_every=0"):
        drop_layers(model, [1, 4])
    assert_same(before, snapshot(model))
    model.config.rescale_every = 0
    expected = skipping(model, [1, 4], {"input_ids": torch.arange(5, 15)[None]})
    drop_layers(model, [1, 4])
    torch.testing.assert_close(skipping(model, [], {"input_ids": torch.arange(5, 15)[None]}), expected, rtol=0, atol=0)
