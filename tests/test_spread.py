"""The spread of scores over batches: each is scored as it is alone, and what its layers share does not count."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from trimllm_hf import score_layers
from trimllm_hf.importance import standard_error


def batches() -> list[dict[str, torch.Tensor]]:
    """Of different lengths; the last has no label."""
    rows = [torch.arange(5, 5 + length)[None] for length in (4, 7, 11)]
    found = [{"input_ids": row, "labels": row.clone()} for row in rows]
    return [*found, {"input_ids": rows[0], "labels": torch.full_like(rows[0], -100)}]


@pytest.mark.parametrize("importance", ["sensitivity", "perplexity", "block_influence"])
def test_the_scores_of_each_batch_are_those_of_it_alone(importance: str) -> None:
    model, found = tiny_model(), []
    whole = score_layers(model, batches(), importance, of_batches=found)
    assert torch.equal(whole, score_layers(model, batches(), importance))  # looking at it changes nothing
    labelled = batches() if importance == "block_influence" else batches()[:3]
    alone = [score_layers(model, [batch], importance) for batch in labelled]
    assert len(found) == len(alone)
    for of_batch, expected in zip(found, alone, strict=True):
        assert torch.allclose(of_batch, expected, rtol=1e-5)


def test_it_is_the_standard_error_of_what_batches_do_not_share() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 5, generator=generator, dtype=torch.float64) * torch.tensor([0.5, 1.0, 1.0, 2.0, 1.0])
    found = standard_error(list(scores))
    assert found is not None
    shifted = standard_error(list(scores + 100 * torch.randn(4000, 1, generator=generator, dtype=torch.float64)))
    assert torch.allclose(found, shifted)  # harder batches raise all
    # of independent layers with the same variance v, less the batch's mean: v (L - 1) / L, which the factor restores
    equal = standard_error(list(torch.randn(4000, 5, generator=generator, dtype=torch.float64)))
    assert torch.allclose(equal, torch.full((5,), 4000**-0.5, dtype=torch.float64), rtol=0.1)
    assert found.argmin() == 0 and found.argmax() == 3


def test_of_one_batch_nothing_is_said() -> None:
    assert standard_error([]) is None and standard_error([torch.ones(3)]) is None
    assert standard_error([torch.ones(1)] * 4) is None
