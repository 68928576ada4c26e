"""Scores that need no loss, on a stack whose order is known; the registry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import tiny_model, tiny_texts
from torch import nn

from trimllm_hf import register_importance, score_layers
from trimllm_hf.importance.scores import _REGISTRY, known, needs_data


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.stack([text["input_ids"] for text in tiny_texts(4)])}]


def with_identity_at(position: int) -> nn.Module:
    """A model in which one block adds nothing to its input."""
    model = tiny_model()
    block = model.model.layers[position]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return model


def test_block_influence_of_an_identity_is_zero() -> None:
    scores = score_layers(with_identity_at(3), batches(), "block_influence")
    assert scores.argmin() == 3 and scores[3].abs() < 1e-6 and scores[[0, 1, 2, 4, 5]].min() > 1e-3


def test_block_influence_does_not_look_at_padding() -> None:
    model = tiny_model()
    (batch,) = batches()
    ids = torch.cat([batch["input_ids"], torch.zeros(4, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(4, 16, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)], dim=1)
    padded = score_layers(model, [{"input_ids": ids, "attention_mask": mask}], "block_influence")
    torch.testing.assert_close(padded, score_layers(model, batches(), "block_influence"), rtol=1e-5, atol=1e-7)


def test_last_goes_from_the_top() -> None:
    assert score_layers(tiny_model(), [], "last").argsort().tolist() == [5, 4, 3, 2, 1, 0]


def test_random_is_by_its_seed_and_leaves_the_generator() -> None:
    model = tiny_model()
    state = torch.get_rng_state()
    first, again, other = (score_layers(model, [], "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_scoring_leaves_each_module_in_its_mode() -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    score_layers(model, batches(), "block_influence")
    assert [module.training for module in model.modules()] == modes


def test_a_score_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimllm_hf.importance.scores._REGISTRY", dict(_REGISTRY))

    def by_norm(model: nn.Module, batches: Sequence, unit: str) -> tuple[torch.Tensor, float]:
        blocks = model.model.layers
        return torch.tensor([float(block.mlp.down_proj.weight.norm()) for block in blocks]), 1.0

    register_importance("by_norm", by_norm)
    assert score_layers(with_identity_at(2), batches(), "by_norm").argmin() == 2
    with pytest.raises(ValueError, match="new name for an importance, got 'by_norm'"):
        register_importance("by_norm", by_norm)


@pytest.mark.parametrize("name", filter(needs_data, known()))
@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_a_batch_without_tokens_is_refused(name: str, shape: tuple[int, int]) -> None:
    model, empty = tiny_model(), torch.zeros(shape, dtype=torch.long)
    full = batches()[0]["input_ids"]
    given = [{"input_ids": full, "labels": full}, {"input_ids": empty, "labels": empty}]
    with pytest.raises(ValueError, match=rf"Expected .* with tokens .*{name}.*\({shape[0]}, {shape[1]}\)\. Leave out"):
        score_layers(model, given, name)


def test_an_empty_input_is_refused_under_any_name() -> None:
    with pytest.raises(ValueError, match="inputs_embeds have the shape"):
        score_layers(tiny_model(), [{"inputs_embeds": torch.zeros(1, 0, 32)}], "block_influence")
    with pytest.raises(ValueError, match="decoder_input_ids have the shape"):
        ids = torch.ones(1, 4, dtype=torch.long)
        score_layers(tiny_model(), [{"input_ids": ids, "decoder_input_ids": ids[:, :0]}], "block_influence")
