"""Tiny models of many architectures, padded batches for them, and the slow and plain way to score their layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from trimllm_hf import drop_layers
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.sublayers import attentions_that_stay

VOCABULARY = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64}
EXPERTS: dict[str, Any] = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}

# class -> settings of its config beside COMMON
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 4},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "GemmaForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": GROUPED,
    "GPT2LMHeadModel": GPT,
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "BloomForCausalLM": {"n_layer": 5, "n_head": 4},
    "MptForCausalLM": {"d_model": 32, "n_layers": 5, "n_heads": 4},
    "FalconForCausalLM": {"alibi": True, "new_decoder_architecture": False},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "StableLmForCausalLM": GROUPED,
    "CohereForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "MixtralForCausalLM": EXPERTS,
    "MambaForCausalLM": {"state_size": 4},
    "BertForSequenceClassification": {"num_labels": 3},
    "LlamaForSequenceClassification": {**GROUPED, "num_labels": 3},
}
LISTS = {"OpenAIGPTLMHeadModel": GPT}  # blocks that return a list; the first cannot go, as all share one activation module


def make_model(name: str, seed: int = 0, **settings: Any) -> Any:
    """A random model whose layers differ in what they do to the loss."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**COMMON, **{**ARCHITECTURES, **LISTS}[name], **settings})
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model


def make_batches(model: nn.Module, sizes: tuple[tuple[int, int], ...] = ((3, 9), (1, 7), (4, 4)), seed: int = 1) -> Any:
    """Batches of (rows, tokens), each row of another length; the last has as many rows as tokens and as heads."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, tokens in sizes:
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, tokens - row % (tokens - 2) :] = 0
        ids = ids.masked_fill(mask == 0, 0)
        labels = ids.masked_fill(mask == 0, -100)
        if "SequenceClassification" in type(model).__name__:
            labels = torch.randint(3, (rows,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def loss_per_token(model: nn.Module, batches: Any) -> float:
    """Mean loss over all labels of all batches, by plain forward passes."""
    causal = "SequenceClassification" not in type(model).__name__
    total = count = 0.0
    for batch in batches:
        tokens = int(((batch["labels"][:, 1:] if causal else batch["labels"]) != -100).sum())
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


def by_dropping(model: nn.Module, batches: Any) -> torch.Tensor:
    """Each layer's leave-one-out loss, of a copy of the model from which the layer was really dropped."""
    scores = []
    for position in range(model.config.num_hidden_layers):
        smaller = copy.deepcopy(model).eval()
        drop_layers(smaller, [position])
        smaller.config.output_router_logits = False  # the loss that balances experts says nothing of the answer
        with torch.no_grad():
            scores.append(loss_per_token(smaller, batches))
    return torch.tensor(scores, dtype=torch.float64)


def by_dropping_halves(model: nn.Module, batches: Any) -> dict[int, float]:
    """The same of each attention and MLP that may go, by its position."""
    plain: dict[int, float] = {}
    depth = model.config.num_hidden_layers
    stay = attentions_that_stay(find_blocks(model), range(depth), range(depth))  # the cache reads its length from them
    for position in [2 * layer + half for layer in range(depth) for half in (0, 1) if half or layer not in stay]:
        smaller = copy.deepcopy(model).eval()
        drop_layers(smaller, [position], "sublayer")
        smaller.config.output_router_logits = False
        with torch.no_grad():
            plain[position] = loss_per_token(smaller, batches)
    return plain
