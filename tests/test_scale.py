"""docs/scale.md: what its arithmetic counts is counted in a run, and its tables are those that the script makes."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimllm_hf import score_layers

ROOT = Path(__file__).parents[1]


def load_scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


scale = load_scale()


@contextmanager
def tokens_seen(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Tokens that the linear layers in question get, call by call."""
    seen: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel())) for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("blocks", [4, 7])
def test_the_passes_of_a_scan_are_those_counted(blocks: int) -> None:
    """Two batches more cost twice what the page says of one; what comes once a scan cancels."""
    model = tiny_model(num_hidden_layers=blocks)
    ids = torch.randint(3, VOCABULARY, (3, 8))
    batch = {"input_ids": ids, "labels": ids}
    # modules within the blocks, which the replaced forwards of the blocks still call
    inner, heads = [layer.mlp.down_proj for layer in model.model.layers], [model.lm_head]
    counted = []
    for batches in (2, 4):
        with tokens_seen(inner) as of_blocks, tokens_seen(heads) as of_heads:
            score_layers(model, [batch] * batches)
        counted.append((sum(of_blocks) / ids.numel(), sum(of_heads) / ids.numel()))
    (few_blocks, few_heads), (more_blocks, more_heads) = counted
    assert more_blocks - few_blocks == 2 * scale.sweep_passes(blocks)
    # the model's own rows, and the twice as many that show the shapes: one token of eight each
    assert more_heads - few_heads == 2 * (scale.head_passes(blocks) + 3 / 8)


def test_a_shape_has_the_parameters_that_transformers_gives_it() -> None:
    shape = scale.SHAPES[0]
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.parameters(32) + config.hidden_size == model.num_parameters()  # the last norm


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    assert page.split(scale.BEGIN)[1].split(scale.END)[0].strip() == scale.tables()
