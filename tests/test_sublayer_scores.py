"""Scores of attentions and MLPs: the sweep against really dropping them, statistics against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from importance_models import by_dropping_halves, make_batches, make_model
from transformers.utils import logging

from trimllm_hf import LayerMap, drop_layers, score_layers

ARCHITECTURES = [
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"),
    *("GPTNeoXForCausalLM", "OPTForCausalLM", "StableLmForCausalLM", "CohereForCausalLM", "Olmo2ForCausalLM"),
    *("GraniteForCausalLM", "MixtralForCausalLM"),
]


@pytest.fixture(autouse=True)
def only_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scan falls back on one by one unseen."""

    def refuse(message: str, *args: object) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(logging.get_logger("transformers.trimllm_hf"), "warning_once", refuse)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sweep_equals_dropping_each_sublayer_in_turn(name: str) -> None:
    model = make_model(name, num_hidden_layers=3)
    batches = make_batches(model, ((3, 6), (2, 4)))
    scores = score_layers(model, batches, unit="sublayer")
    assert len(scores) == len(LayerMap.from_config(model.config).sublayers) == 6
    plain = by_dropping_halves(model, batches)
    expected = torch.tensor(list(plain.values()), dtype=torch.float64)
    torch.testing.assert_close(scores[list(plain)], expected, rtol=1e-6, atol=1e-6)
    assert len(set(plain.values())) == len(plain) >= 4


def added(model: Any, batch: dict[str, torch.Tensor], names: tuple[str, str]) -> list[list[torch.Tensor]]:
    """What each block's attention and MLP add for each real token, and the states before them, by hooks on the modules."""
    seen: list[Any] = []
    handles = []
    for block in model.get_decoder().layers:
        handles.append(block.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        for name in names:
            handles.append(
                block.get_submodule(name).register_forward_hook(
                    lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
                )
            )
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"] != 0
    kept = [state[real] for state in seen]
    return [kept[i : i + 3] for i in range(0, len(kept), 3)]


@pytest.mark.parametrize(
    ("name", "modules", "parallel"),
    [
        ("LlamaForCausalLM", ("self_attn", "mlp"), False),
        ("Gemma2ForCausalLM", ("post_attention_layernorm", "post_feedforward_layernorm"), False),
        ("CohereForCausalLM", ("self_attn", "mlp"), True),
    ],
)
def test_statistics_of_halves(name: str, modules: tuple[str, str], parallel: bool) -> None:
    model = make_model(name, num_hidden_layers=3).eval()
    (batch,) = make_batches(model, ((3, 6),))
    pairs = []
    for x, attention, mlp in added(model, batch, modules):
        pairs += [(x, x + attention), (x, x + mlp) if parallel else (x + attention, x + attention + mlp)]
    expected = {
        "block_influence": [(1 - torch.cosine_similarity(x, y, dim=-1)).mean() for x, y in pairs],
        "relative_magnitude": [((y - x).norm(dim=-1) / y.norm(dim=-1)).mean() for x, y in pairs],
        "activation_norm": [-(y - x).norm(dim=-1).mean() for x, y in pairs],
    }
    for importance, values in expected.items():
        scores = score_layers(model, [batch], importance, "sublayer")
        torch.testing.assert_close(scores, torch.stack(values).double(), rtol=1e-4, atol=1e-5)


def test_the_half_that_is_left_is_the_block() -> None:
    model = make_model("LlamaForCausalLM", num_hidden_layers=3)
    drop_layers(model, [3], "sublayer")  # the MLP of layer 1
    batches = make_batches(model, ((3, 6),))
    assert len(score_layers(model, batches, unit="sublayer")) == 5
    halves = score_layers(model, batches, "block_influence", "sublayer")
    blocks = score_layers(model, batches, "block_influence")
    assert len(halves) == 5 and halves[2] == pytest.approx(blocks[1].item(), rel=1e-5)


def test_taylor_of_halves_is_of_their_weights() -> None:
    model = make_model("LlamaForCausalLM", num_hidden_layers=3)
    batches = make_batches(model, ((3, 6),))
    scores = score_layers(model, batches, "taylor", "sublayer")
    model.eval()(**batches[0]).loss.backward()
    for position, block in enumerate(model.model.layers):
        for half, module in enumerate((block.self_attn, block.mlp)):
            expected = sum((p * p.grad).abs().sum().item() for p in module.parameters())
            assert scores[2 * position + half].item() >= expected * (1 - 1e-5)
            with_norms = sum((p * p.grad).abs().sum().item() for name, p in block.named_parameters() if "layernorm" in name)
            assert scores[2 * position + half].item() <= (expected + with_norms) * (1 + 1e-5)


def test_windows_of_halves_are_refused() -> None:
    model = make_model("LlamaForCausalLM", num_hidden_layers=3)
    with pytest.raises(ValueError, match="unit='block' for the importance 'angular'"):
        score_layers(model, make_batches(model, ((3, 6),)), "angular", "sublayer")
