"""Latency: what is counted is what is there, a pair is paired, and a report survives the disk."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from trimllm_hf import drop_layers
from trimllm_hf.latency import measure as latency
from trimllm_hf.latency.measure import measure_latency
from trimllm_hf.latency.report import LatencyReport, median_interval
from trimllm_hf.latency.sizes import byte_bound, sizes_of

FAST = {"prompt_tokens": 6, "new_tokens": 4, "repeats": 6, "warmup": 1}


def llama(layers: int = 6, tied: bool = False, **changes: object) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **changes,
    )
    return AutoModelForCausalLM.from_config(config)


def halved(model: PreTrainedModel) -> PreTrainedModel:
    trimmed = copy.deepcopy(model)
    drop_layers(trimmed, [1, 2, 4])
    return trimmed


@pytest.mark.parametrize("tied", [False, True])
def test_the_bound_is_one_over_one_minus_f_times_s(tied: bool) -> None:
    base = llama(tied=tied)
    trimmed = halved(base)
    blocks = sum(p.numel() for p in base.model.layers.parameters()) * 4
    norm_and_head = (base.model.norm.weight.numel() + base.lm_head.weight.numel()) * 4
    buffers = sum(b.nbytes for b in base.buffers())
    f, s = 3 / 6, blocks / (blocks + norm_and_head + buffers)
    assert byte_bound(sizes_of(base), sizes_of(trimmed)) == pytest.approx(1 / (1 - f * s))


def test_sizes_count_shared_weights_once_and_are_the_same_on_the_meta_device() -> None:
    model = llama(tied=True)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config)
    sizes = sizes_of(model)
    assert sizes.parameters == model.num_parameters()
    assert sizes.kv_cache_bytes_per_token == 2 * 6 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert sizes_of(meta) == sizes


def test_the_cache_of_other_architectures() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64))
    assert sizes_of(gpt2).kv_cache_bytes_per_token == 2 * 3 * 32 * 4


def test_no_bound_where_not_all_weights_are_read() -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    sizes = sizes_of(AutoModelForCausalLM.from_config(config))
    assert sizes.decode_bytes is None
    assert byte_bound(sizes, sizes) is None


def test_a_pair() -> None:
    base = llama().train()
    trimmed = halved(base)
    own = trimmed.generation_config
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    report = measure_latency(trimmed, base, batch_sizes=(1, 3), **FAST)
    assert torch.rand(1) == expected, "the random state has moved"
    assert base.training and base.model.layers[0].mlp.training, "the mode has changed"
    assert trimmed.generation_config is own
    assert (report.sizes.num_layers, report.base_sizes.num_layers) == (3, 6)
    assert [(s.what, s.batch_size) for s in report.speedups] == [
        ("prefill", 1), ("decode", 1), ("prefill", 3), ("decode", 3)
    ]  # fmt: skip
    for run in (*report.runs, *report.base_runs):
        assert run.decode_ms_per_token.p50 <= run.decode_ms_per_token.p90
        assert run.decode_ms_per_token.n == FAST["repeats"]
        assert run.decode_tokens_per_s == pytest.approx(run.batch_size * 1000 / run.decode_ms_per_token.p50)
    decode = report.speedup("decode", 3)
    assert decode.low <= decode.ratio <= decode.high
    assert decode.share_of_bound == pytest.approx(decode.ratio / byte_bound(report.base_sizes, report.sizes))
    assert report.runs[0].peak_memory_bytes >= report.sizes.weight_bytes


def test_rounds_are_interleaved_and_timed_by_the_clock_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that each block of a model moves by 1 s, and that drifts, the ratio is that of the depths."""
    base = llama()
    trimmed = halved(base)
    now, calls = [0.0], []

    def tick(model: str) -> None:
        calls.append(model)
        now[0] += 1 + len(calls) * 1e-4  # the machine gets slower and slower

    for name, model in (("base", base), ("trimmed", trimmed)):
        for block in model.model.layers:
            block.register_forward_hook(lambda *_, name=name: tick(name))
    monkeypatch.setattr(latency, "timer", lambda: now[0])
    report = measure_latency(trimmed, base, **FAST)
    assert report.speedup("decode").ratio == pytest.approx(2, rel=0.01)
    assert report.speedup("prefill").ratio == pytest.approx(2, rel=0.01)
    assert report.base_runs[0].prefill_ms.p50 == pytest.approx(6000, rel=0.2)
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert "base" in order[-3:] and "trimmed" in order[-3:]
    assert len(order) >= FAST["repeats"] + 2, "the models did not take turns"


def test_static_cache_and_end_of_sequence_do_not_stop_it() -> None:
    model = llama()
    model.generation_config.eos_token_id = list(range(64))  # would stop after one token
    report = measure_latency(model, cache="static", **FAST)
    assert report.speedups == () and report.base_sizes is None
    assert report.runs[0].decode_ms_per_token.p50 > 0


def test_an_encoder_is_timed_per_batch() -> None:
    config = BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
    base = AutoModelForSequenceClassification.from_config(config)
    trimmed = copy.deepcopy(base)
    drop_layers(trimmed, [1, 2])
    report = measure_latency(trimmed, base, batch_sizes=(4,), **FAST)
    assert report.runs[0].forward_ms.n == 6 and report.runs[0].decode_ms_per_token is None
    assert [s.what for s in report.speedups] == ["forward"] and report.speedups[0].byte_bound is None
    assert "new_tokens" not in report.settings
    assert LatencyReport.from_dict(report.to_dict()) == report


def test_round_trip_and_damage(tmp_path) -> None:
    report = measure_latency(llama(), **FAST)
    report.to_json(tmp_path / "latency.json")
    assert LatencyReport.from_json(tmp_path / "latency.json") == report
    assert replace(report, settings={}) != report
    for damage in ({}, {"sizes": {}}, {**report.to_dict(), "extra": 1}):
        with pytest.raises(ValueError, match="Expected a latency report"):
            LatencyReport.from_dict(damage)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 12])
def test_the_interval_of_the_median_covers_what_it_says(n: int) -> None:
    """Counted over every way in which n values can fall on the two sides of the true median."""
    sides = list(product((-1, 1), repeat=n))

    def counted(k: int) -> float:
        return sum(sorted(side)[k - 1] < 0 < sorted(side)[n - k] for side in sides) / len(sides)

    low, high, coverage = median_interval(list(range(n)))
    k = int(low) + 1
    assert high == n - k
    assert coverage == counted(k)
    if n >= 6:
        assert coverage >= 0.95 > counted(k + 1), "a narrower interval would do, or this one is too narrow"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"new_tokens": 1}, "new_tokens of at least 2, got 1"),
        ({"repeats": 0}, "repeats of at least 1"),
        ({"cache": "paged"}, "'dynamic' or 'static', got 'paged'"),
        ({"compile": True, "cache": "static"}, "on an accelerator"),
        ({"prompt_tokens": 100}, "at most the 64 positions"),
    ],
)
def test_refusals(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(llama(), **{**FAST, **settings})


def test_a_base_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same dtype, got torch.bfloat16 and torch.float32"):
        measure_latency(llama(), llama().bfloat16(), **FAST)


def test_a_base_that_shared_its_config_with_the_trimmed_model_is_measured_whole() -> None:
    """Its forward pass runs as many blocks as the config says: a drop must leave the base's config alone."""
    base = llama()
    trimmed = AutoModelForCausalLM.from_config(base.config)
    drop_layers(trimmed, [1, 2, 4])
    assert len(base.model.layers) == 6 and base.config.num_hidden_layers == 6 and trimmed.config.num_hidden_layers == 3
    report = measure_latency(trimmed, base, **FAST)
    assert report.base_sizes is not None
    assert (report.base_sizes.num_layers, report.sizes.num_layers) == (6, 3)
