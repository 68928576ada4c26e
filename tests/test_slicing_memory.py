"""Slicing needs little memory beside the weights, as the operating system counts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc, re, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from trimllm_hf import slice_model

torch.set_num_threads(1)
torch.manual_seed(0)

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def model_of(**sizes):
    config = LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()

def sliced(model, rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, 1, 512), generator=generator)
    slice_model(model, [{"input_ids": row} for row in ids], 0.25, "uniform", progress=False)

# what libraries allocate once does not count
sliced(model_of(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2), 1)
gc.collect()
before = resident("VmRSS")
model = model_of(vocab_size=32768, hidden_size=384, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=6)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
sliced(model, 8)
print((resident("VmHWM") - before) / weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_at_most_one_and_a_half_times_the_weights() -> None:
    """Of a model of 200 MB with a tied table of a quarter of that: it gets a head of its own."""
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=280)
    assert found.returncode == 0, found.stderr
    assert 1 < float(found.stdout.split()[-1]) < 1.5
