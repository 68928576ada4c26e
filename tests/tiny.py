"""Tiny models of many families and small data sets, built in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"multi_query": False},
    "mixtral": {"num_local_experts": 2},
    "bert": {},
}


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of six layers with random weights, in evaluation mode."""
    derived = {"gpt2": COMMON, "falcon": ["head_dim"]}.get(family, [])
    common = {name: value for name, value in COMMON.items() if name not in derived}
    config = AutoConfig.for_model(family, **{**common, "vocab_size": VOCABULARY, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    with torch.no_grad():  # the defaults make layers that hardly change their input: every layer must count
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def tiny_texts(size: int = 120, length: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Examples for a causal language model: random tokens that are their own labels."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for _ in range(size)]
    return [{"input_ids": text, "labels": text} for text in texts]


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    """Token ids of shape (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
