"""A language model in two dimensions whose blocks do what can be worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ROTATE = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # a quarter turn
SAME = torch.eye(2)
# token -> its vector: length 1, and a right angle between neighbours
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


class ToyBlock(nn.Module):
    """x -> weight * matrix x."""

    def __init__(self, matrix: torch.Tensor, weight: float) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states @ self.matrix.T


class ToyForCausalLM(PreTrainedModel):
    """Blocks: a turn, the identity, a doubling, and a copy of the turn. Logits: the vector against each token's."""

    config_class = LlamaConfig
    _no_split_modules = ("ToyBlock",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([ToyBlock(ROTATE, 1.0), ToyBlock(SAME, 1.0), ToyBlock(SAME, 2.0), ToyBlock(ROTATE, 1.0)])
        self.register_buffer("vectors", VECTORS.clone())

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None, **_: Any) -> CausalLMOutput:
        hidden_states = self.vectors[input_ids]
        for block in self.layers:
            hidden_states = block(hidden_states)
        logits = hidden_states @ self.vectors.T
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


def toy_model() -> ToyForCausalLM:
    return ToyForCausalLM(LlamaConfig(num_hidden_layers=4, hidden_size=2, vocab_size=4, num_attention_heads=1)).eval()
