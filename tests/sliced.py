"""What the tests of slicing share: models with gains and biases that count, and calibration batches."""

from __future__ import annotations

from typing import Any

import torch
from tiny import FAMILIES, tiny_model, tokens
from transformers import PreTrainedModel

# By name: the family, and what differs from its tiny model.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2", "gpt_neox")},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "sequential gpt_neox": ("gpt_neox", {"use_parallel_residual": False}),
    "one norm for both": ("phi", {}),
    "1 + weight": ("gemma", {}),
}


def model_to_slice(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model whose norms have gains, and biases where there are any."""
    family, own = ARCHITECTURES[name]
    for other in ("phi3", "gemma"):
        FAMILIES.setdefault(other, {})
    model = tiny_model(family, seed, **{**own, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def calibration(batches: int = 3, rows: int = 4, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens, the first with padding on the right of its first row, the last with padding on the left."""
    found = []
    for number in range(batches):
        ids = tokens(rows, length, seed=number)
        mask = torch.ones_like(ids)
        if number == 0:
            mask[0, length // 2 :] = 0
        if number == batches - 1:
            mask[-1, : length // 4] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
