"""Models with other heads lose sublayers as well, and the Auto classes load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_model, tokens

from trimllm_hf import LayerMap, drop_layers

HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]


def outputs(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(tokens())
    return torch.cat([found.start_logits, found.end_logits]) if "start_logits" in found else found.logits


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("head", HEADS)
def test_an_mlp_and_an_attention_go_behind_other_heads(head: str, architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}For{head}")(tiny_model(architecture.lower()).config)
    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference.base_model.layers[1].mlp.down_proj.weight.zero_()
        reference.base_model.layers[4].self_attn.o_proj.weight.zero_()
    full = outputs(model)
    drop_layers(model, [3, 8], unit="sublayer")
    torch.testing.assert_close(outputs(model), outputs(reference), rtol=0, atol=1e-6)
    assert not torch.allclose(outputs(model), full)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert LayerMap.from_config(again.config).missing_sublayers == ((1, "mlp"), (4, "attention"))
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    drop_layers(again, [0])
    assert len(again.base_model.layers) == 5 and not any(True for _ in again.base_model.layers[0].mlp.parameters())


def test_a_head_is_put_on_a_body_without_halves(tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [3, 8], unit="sublayer")
    model.save_pretrained(tmp_path)
    for head in ("SequenceClassification", "TokenClassification"):
        found = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
        with torch.no_grad():
            bodies = [each.eval().base_model(tokens()).last_hidden_state for each in (found, model)]
        torch.testing.assert_close(*bodies, rtol=0, atol=0)
    with pytest.raises(ValueError, match="missing_keys"):  # its body has another name, and stock ones begin at random
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_a_config_of_a_model_without_halves_does_not_make_another_one() -> None:
    model = tiny_model()
    drop_layers(model, [3], unit="sublayer")
    whole = transformers.LlamaForCausalLM(model.config)
    assert all(any(True for _ in block.mlp.parameters()) for block in whole.model.layers)
    before = whole.config.trim
    with pytest.raises(ValueError, match=r"got one with all sublayers.*Nothing was changed"):
        drop_layers(whole, [3], unit="sublayer")
    assert whole.config.trim == before and len(whole.model.layers) == 6
    built = transformers.AutoModelForCausalLM.from_config(model.config)
    drop_layers(built, [3], unit="sublayer")
    assert LayerMap.from_config(built.config).missing_sublayers == ((1, "mlp"), (2, "attention"))
