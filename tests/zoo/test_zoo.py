"""Every causal-LM type that transformers knows: trimmed exactly, or refused untouched."""

from __future__ import annotations

import pytest
import transformers
from check import check_blocks
from sweep import DOCS, counts, run, table
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# One for each way in which a config speaks of layers.
EXACT = [
    "llama",  # a depth
    "gpt2",  # a depth by another name
    "gemma3_text",  # a type for each layer
    "qwen3_moe",  # numbers of layers, and a step
    "llama4_text",  # numbers of layers
    "deepseek_v3",  # the first so many
    "jamba",  # periods with offsets
    "recurrent_gemma",  # a pattern that is repeated
    "gpt_neo",  # a pattern in shorthand
    "gemma4_unified_text",  # overrides by number
    "minicpm3",  # a scale by the depth
    "bart",  # the decoder's own depth
    "ctrl",  # blocks without a mark
    "zamba2",  # blocks that share weights
]
REFUSED = {
    "diffllama": "lambda_init",
    "beam": "residual_add_idx",
    "gemma3n_text": "per_layer_model_projection",
    "xlm": "Expected one list of 6 blocks",
}


@pytest.mark.parametrize("model_type", EXACT)
def test_two_blocks_go_exactly(model_type: str) -> None:
    outcome = check_blocks(AutoModelForCausalLM, model_type)
    assert outcome.status == "exact", outcome


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_a_config_cannot_say_is_refused_untouched(model_type: str) -> None:
    outcome = check_blocks(AutoModelForCausalLM, model_type, pairs=[(1, 4)])
    assert outcome.status == "refused", outcome
    assert REFUSED[model_type] in outcome.detail


@pytest.mark.slow
def test_no_type_goes_wrong() -> None:
    outcomes = run(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    bad = [outcome for outcome in outcomes if outcome.status not in ("exact", "refused", "unbuilt")]
    assert not bad, bad
    built = sum(outcome.status != "unbuilt" for outcome in outcomes)
    assert built >= 170, counts(outcomes)
    assert sum(outcome.status == "exact" for outcome in outcomes) >= 0.9 * built, counts(outcomes)
    page = DOCS.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" in page:
        assert counts(outcomes) in table(outcomes, []) and f"Blocks: {counts(outcomes)}." in page
