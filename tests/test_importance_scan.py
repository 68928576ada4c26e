"""The one-sweep scan gives the scores of the plain loop, within its memory, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from importance_models import ARCHITECTURES, by_dropping, loss_per_token, make_batches, make_model
from transformers.utils import logging

from trimllm_hf import TrimConfig, score_layers
from trimllm_hf.surgery.units import list_units, without

END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def only_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scan falls back on one by one unseen."""

    def refuse(message: str, *args: object) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(logging.get_logger("transformers.trimllm_hf"), "warning_once", refuse)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_dropping_each_layer_in_turn(name: str) -> None:
    model = make_model(name)
    batches = make_batches(model)
    scores = score_layers(model, batches)
    expected = by_dropping(model, batches)
    assert len(set(expected.tolist())) == len(expected)  # a model whose layers all score the same would show nothing
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


def rows_run(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], **settings: float) -> list[list[int]]:
    """For each block the number of rows in every call of its inside."""
    calls: list[list[int]] = []
    for block in model.model.layers:
        seen: list[int] = []
        block.mlp.register_forward_hook(lambda _, args, output, seen=seen: seen.append(len(args[0])))
        calls.append(seen)
    score_layers(model, batches, **settings)
    return calls


def test_a_block_runs_once_a_batch_on_all_candidates() -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model, ((2, 9), (2, 8), (2, 7)))
    calls = rows_run(model, batches)
    # the first batch's first candidate is scored the plain way as well, in one more forward pass, to check the sweep
    assert calls == [[2] + 3 * [2 * (1 + position)] for position in range(5)]


@pytest.mark.parametrize("budget", [1e-9, 2e-5, 5e-5, 1e-4])
def test_less_memory_means_smaller_steps_and_the_same_scores(budget: float) -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model)
    torch.testing.assert_close(
        score_layers(model, batches, memory_gb=budget), by_dropping(model, batches), rtol=1e-6, atol=1e-6
    )
    most = max(max(seen) for seen in rows_run(model, batches, memory_gb=budget))
    assert most < max(max(seen) for seen in rows_run(make_model("LlamaForCausalLM"), batches))


@pytest.mark.parametrize("unit", ["block", "sublayer"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "bf16 by autocast"])
def test_in_bf16_it_is_the_plain_loop_but_for_its_rounding(unit: str, autocast: bool) -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model)
    exact = score_layers(model, batches, unit=unit)
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = score_layers(model, batches, unit=unit)
        units, plain = list_units(model, unit), []
        for each in units:
            with without(each, model.model.layers), torch.no_grad():
                plain.append(loss_per_token(model.eval(), batches))
    torch.testing.assert_close(scores, torch.tensor(plain, dtype=torch.float64), rtol=0.01, atol=0.01)
    assert not torch.equal(scores, exact)  # it was computed in half precision


def test_the_bar_counts_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int, desc: str, disable: bool) -> None:
            assert desc == "Layers scored" and not disable
            self.total, self.count = total, 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            bars.append((self.count, self.total))

        def update(self) -> None:
            self.count += 1

    monkeypatch.setattr(logging, "tqdm", Bar)
    model = make_model("LlamaForCausalLM")
    score_layers(model, make_batches(model), progress=True)
    assert bars == [(5 * 3, 5 * 3)]


def test_nothing_is_left_behind() -> None:
    model = make_model("MixtralForCausalLM")
    model.train()
    model.model.layers[1].eval()
    hooked: list[int] = []
    model.model.layers[2].register_forward_hook(lambda *_: hooked.append(1))
    batches = make_batches(model)
    before = [dict(vars(module)) for module in model.modules()], model.config.to_dict(), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    score_layers(model, batches)
    after = [dict(vars(module)) for module in model.modules()], model.config.to_dict(), torch.get_rng_state()
    assert [attributes.keys() for attributes in before[0]] == [attributes.keys() for attributes in after[0]]
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    hooked.clear()
    model(**batches[0])
    assert hooked == [1]


def by_hooks(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The loss with each block passed over, by a hook; for a model whose copy would not be patched like it."""
    plain = []
    for block in model.model.layers:
        handle = block.register_forward_hook(lambda _, args, output: args[0])
        with torch.no_grad():
            plain.append(loss_per_token(model.eval(), batches))
        handle.remove()
    return torch.tensor(plain, dtype=torch.float64)


def test_a_model_that_mixes_rows_is_scored_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model, ((2, 9), (2, 8)))
    inside = model.model.layers[3].mlp.forward
    monkeypatch.setattr(model.model.layers[3].mlp, "forward", lambda x: inside(x) + 5 * len(x) * x.roll(1, dims=-1))
    told: list[str] = []
    monkeypatch.setattr(logging.get_logger("transformers.trimllm_hf"), "warning_once", told.append)
    scores = score_layers(model, batches)
    assert told
    torch.testing.assert_close(scores, by_hooks(model, batches), rtol=1e-6, atol=1e-6)


def without_prompts(batches: list[dict[str, torch.Tensor]], seed: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of which two labels a row are left at most, none in the first row, at places of their own in each row."""
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        kept = torch.rand(batch["labels"].shape, generator=generator).topk(2, dim=1).indices
        labels = torch.full_like(batch["labels"], -100).scatter(1, kept, batch["labels"].gather(1, kept))
        labels[0] = -100
        batch["labels"] = labels
    return batches


def head_calls(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """Positions a row in each call of the head by a scan."""
    seen: list[int] = []
    with_hook = model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    score_layers(model, batches)
    with_hook.remove()
    return seen


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.endswith("SequenceClassification")])
def test_without_labels_in_the_prompts_it_equals_dropping_each_layer(name: str) -> None:
    model = make_model(name)
    batches = without_prompts(make_batches(model, ((3, 9), (2, 8), (4, 4))))
    scores, expected = score_layers(model, batches), by_dropping(model, batches)
    assert len(set(expected.tolist())) == len(expected)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_head_runs_on_what_labels_ask_for() -> None:
    model = make_model("LlamaForCausalLM")
    batches = without_prompts(make_batches(model, ((3, 9), (2, 8), (4, 7))))
    calls = head_calls(model, batches)
    assert [size for size in calls if size > 3] == [9]  # the reference, once a scan
    assert len([size for size in calls if 1 < size <= 3]) == 3 * 5


def test_a_head_that_mixes_positions_sees_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("LlamaForCausalLM")
    batches = without_prompts(make_batches(model, ((3, 9), (2, 8))))
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x + 5 * x.roll(3, dims=1)))
    torch.testing.assert_close(score_layers(model, batches), by_hooks(model, batches), rtol=1e-5, atol=1e-5)
    assert len([size for size in head_calls(model, batches) if 1 < size <= 3]) == 1  # tried, and not taken


@pytest.mark.parametrize("importance", [pytest.param("perplexity", marks=pytest.mark.slow), "sensitivity"])
def test_stories_score_as_measured_block_by_block(importance: str, shared: Path) -> None:
    """Of the first 100 stories, `<s>` before each, cut at 512 tokens; the figures are those of ../shared/data/README.md."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = next((shared / "data" / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    stories = ["<s>" + story.strip() for story in text.split(END)[:100]]
    rows = sorted((ids[:512] for ids in tokenizer(stories, add_special_tokens=False).input_ids), key=len)
    batches = []
    for part in (rows[start : start + 10] for start in range(0, 100, 10)):
        ids = torch.tensor([row + [-100] * (len(part[-1]) - len(row)) for row in part])
        batches.append({"input_ids": ids.clamp(min=0), "attention_mask": (ids != -100).long(), "labels": ids})
    scores = score_layers(model, batches, importance)
    perplexities = scores if importance == "perplexity" else scores.exp()
    assert perplexities.tolist() == pytest.approx([119.7, 15.0, 9.0, 10.3, 10.6], rel=0.01)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_scan_without_memory_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="scan_memory_gb above 0"):
        TrimConfig(target_layers=2, scan_memory_gb=value)


def test_a_score_that_is_not_a_number_names_layers_and_batch() -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model)
    ids = batches[1]["input_ids"]
    model.model.embed_tokens.weight.data[60] = float("nan")
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clamp(max=59)
    batches[1]["input_ids"] = torch.full_like(ids, 60)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3, 4\] in batch 1\."):
        score_layers(model, batches)


def test_calibration_without_labels_is_refused() -> None:
    model = make_model("LlamaForCausalLM")
    (batch,) = make_batches(model, ((2, 9),))
    del batch["labels"]
    with pytest.raises(ValueError, match="Expected calibration batches with labels, got only"):
        score_layers(model, [batch])


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="Give more calibration examples, or a filler_batch"):
        score_layers(make_model("LlamaForCausalLM"), [])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'perplexity', 'random'.*'taylor'\], got 'guess'"):
        score_layers(make_model("LlamaForCausalLM"), [], importance="guess")
