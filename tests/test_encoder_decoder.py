"""Encoder-decoders: one stack is trimmed, the other stays whole, and the map says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from trimllm_hf import (
    LayerMap,
    TrimCallback,
    TrimConfig,
    TrimTrainer,
    drop_layers,
    load_kept_layers,
    register_importance,
    score_layers,
    trim_like,
)
from trimllm_hf.cli import app
from trimllm_hf.importance import known
from trimllm_hf.importance import scores as registry
from trimllm_hf.surgery.blocks import find_blocks

SOURCE = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))


def seq2seq(family: str = "bart") -> PreTrainedModel:
    """A tiny encoder-decoder: an encoder of six blocks, a decoder of five."""
    torch.manual_seed(0)
    if family == "t5":
        config: Any = T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=6, num_decoder_layers=5, num_heads=4,
            decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    if family == "bert2bert":
        sizes: Any = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        encoder, decoder = BertConfig(num_hidden_layers=6, **sizes), BertConfig(num_hidden_layers=5, **sizes)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(
            encoder, decoder, decoder_start_token_id=1, pad_token_id=0
        )
        return EncoderDecoderModel(config).eval()
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=6, decoder_layers=5, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():  # the default initialization makes layers that hardly change their input
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=SOURCE, labels=TARGET).logits


@pytest.mark.parametrize(
    ("family", "part", "depths"),
    [
        ("bart", "decoder", (6, 3)),
        ("bart", "encoder", (4, 5)),
        ("t5", "decoder", (6, 3)),
        ("bert2bert", "decoder", (6, 3)),
        ("bert2bert", "encoder", (4, 5)),
    ],
)
def test_one_part_goes_and_the_other_stays(tmp_path: Path, family: str, part: str, depths: tuple[int, int]) -> None:
    model = seq2seq(family)
    base = seq2seq(family)
    other = "encoder" if part == "decoder" else "decoder"
    layer_map = drop_layers(model, [1, 3], part=part)
    assert layer_map.part == part and layer_map.dropped_layers == (1, 3)
    assert (len(find_blocks(model, "encoder")), len(find_blocks(model, "decoder"))) == depths
    for mine, theirs in zip(find_blocks(model, other).blocks, find_blocks(base, other).blocks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(model))
    assert LayerMap.from_config(again.config) == layer_map
    arguments: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(SOURCE, **arguments), again.generate(SOURCE, use_cache=False, **arguments))


def test_modules_with_a_config_of_their_own_follow() -> None:
    model = seq2seq("t5")
    drop_layers(model, [1, 3])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (6, 3)
    rebuilt = T5ForConditionalGeneration(T5Config(**{**model.config.to_dict(), "trim": None}))
    for part in ("encoder", "decoder"):
        mine, theirs = getattr(model, part).config, getattr(rebuilt, part).config
        assert (mine.num_layers, mine.num_decoder_layers) == (theirs.num_layers, theirs.num_decoder_layers)


def test_t5_keeps_its_first_block_and_an_encoder_as_deep_as_its_decoder() -> None:
    model = seq2seq("t5")
    with pytest.raises(ValueError, match="Nothing was changed"):
        drop_layers(model, [0])  # it holds the relative positions of all
    drop_layers(model, [2], part="encoder")
    with pytest.raises(ValueError, match=r"at least 5 encoder layers .*cache"):
        drop_layers(model, [2], part="encoder")
    with pytest.raises(IndexError):  # what the refusal is for, in stock transformers; when it goes, so may the refusal
        config = T5Config(**{**seq2seq("t5").config.to_dict(), "num_layers": 4})
        T5ForConditionalGeneration(config).generate(SOURCE, max_new_tokens=3)


def test_one_map_is_of_one_part() -> None:
    model = seq2seq()
    drop_layers(model, [1], part="encoder")
    with pytest.raises(ValueError, match=r"part 'encoder'.*got 'decoder'"):
        drop_layers(model, [1], part="decoder")
    drop_layers(model, [1])  # the part that was trimmed before
    assert LayerMap.from_config(model.config).kept_layers == (0, 3, 4, 5)


def test_both_parts_in_two_runs(tmp_path: Path) -> None:
    """The second run's base is what the first has saved."""

    def run(model: PreTrainedModel, folder: str, part: str, target: int) -> PreTrainedModel:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=2, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": SOURCE[i % 2], "labels": TARGET[i % 2]} for i in range(16)]
        trim = TrimConfig(target, part=part, drop_every="once", repair="none", importance="last")
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[TrimCallback(trim)])
        trainer.train()
        trainer.save_model(str(tmp_path / folder))
        return model

    run(seq2seq(), "first", "decoder", 3)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=r"part 'decoder'.*got 'encoder'.*model\.config\.trim = None"):
        run(model, "second", "encoder", 4)
    model.config.trim = None
    run(model, "second", "encoder", 4)
    again, info = type(model).from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (len(find_blocks(again, "encoder")), len(find_blocks(again, "decoder"))) == (4, 3)
    assert torch.equal(logits(again), logits(model))
    layer_map = LayerMap.from_config(again.config)
    assert layer_map.part == "encoder" and layer_map.base_model == str(tmp_path / "first")


@pytest.mark.parametrize(("part", "said"), [("decoder", "one stack of layers"), ("middle", "'decoder', 'encoder' or None")])
def test_a_part_that_is_not_there_is_refused(part: str, said: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=said):
        drop_layers(model, [1], part=part)
    with pytest.raises(ValueError, match=said):
        score_layers(model, [{"input_ids": SOURCE, "labels": SOURCE}], part=part)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert"])
def test_scores_are_of_the_part(family: str, part: str) -> None:
    model = seq2seq(family)
    batch = {"input_ids": SOURCE, "labels": TARGET}
    blocks = find_blocks(model, part).blocks
    scores = score_layers(model, [batch], part=part)
    assert len(scores) == len(blocks) and not hasattr(model.config, "trim")
    for position, block in enumerate(blocks):

        def skip(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(skip, with_kwargs=True)
        with torch.no_grad():
            assert scores[position].item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)
        handle.remove()
    influence = score_layers(model, [batch], "block_influence", part=part)
    assert len(influence) == len(blocks) and (influence > 0).all()


@pytest.mark.parametrize(("part", "depth"), [("encoder", 6), ("decoder", 5)])
def test_each_score_is_of_the_part_and_the_config_stays_untouched(
    part: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seq2seq()
    batch = {"input_ids": SOURCE, "labels": TARGET}
    touched: list[str] = []

    def noting(method: Any) -> Any:
        def note(config: Any, name: str, *value: Any) -> None:
            touched.extend([name] if config is model.config else [])
            method(config, name, *value)

        return note

    for name in ("__setattr__", "__delattr__"):
        monkeypatch.setattr(type(model.config), name, noting(getattr(type(model.config), name)))
    handle = model.register_forward_pre_hook(lambda *_: touched.extend({"trim"} & set(vars(model.config))))
    lengths = {name: len(score_layers(model, [batch], name, part=part)) for name in known()}
    handle.remove()
    assert set(lengths.values()) == {depth}, lengths
    assert "trim" not in touched
    model.config.trim = None  # else the test sees nothing
    assert "trim" in touched


def test_a_score_of_ones_own_is_told_the_part_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    model, told = seq2seq(), []

    def with_part(model: Any, batches: Any, unit: str, part: str | None = None) -> tuple[torch.Tensor, float]:
        told.append(part)
        return torch.ones(len(find_blocks(model, part))), 1.0

    register_importance("with_part", with_part)
    register_importance("without", lambda model, batches, unit: (torch.ones(len(find_blocks(model))), 1.0))
    batch = {"input_ids": SOURCE, "labels": TARGET}
    lengths = [len(score_layers(model, [batch], "with_part", part=part)) for part in ("encoder", "decoder", None)]
    assert (lengths, told) == ([6, 5, 5], ["encoder", "decoder", None])
    assert len(score_layers(model, [batch], "without")) == len(score_layers(model, [batch], "without", part="decoder")) == 5
    with pytest.raises(ValueError, match="Expected an importance with a parameter 'part'"):
        score_layers(model, [batch], "without", part="encoder")
    drop_layers(model, [1], part="encoder")
    assert len(score_layers(model, [batch], "without", part="encoder")) == 5  # the config names the encoder now


def test_gradients_of_training_score_the_part(tmp_path: Path) -> None:
    data = [{"input_ids": torch.arange(3, 12) + i, "labels": torch.arange(3, 9) + i} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no"
    )
    how: dict[str, Any] = {"importance": "taylor", "warm_up_importance": "none", "drop_every": "1", "repair": "none"}
    trim = TrimConfig(target_layers=5, part="encoder", calibration_size=4, **how)
    trainer = TrimTrainer(seq2seq(), arguments, train_dataset=data, trim=trim)
    trainer.train()
    assert LayerMap.from_config(trainer.model.config).part == "encoder"
    assert (len(find_blocks(trainer.model, "encoder")), len(find_blocks(trainer.model, "decoder"))) == (5, 5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_and_resume(tmp_path: Path, part: str) -> None:
    def trainer(model: PreTrainedModel, folder: str) -> TrimTrainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, use_cpu=True,
            report_to=[], disable_tqdm=True, seed=3, logging_strategy="no",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(4)
        data = [
            {
                "input_ids": torch.randint(3, 90, (9,), generator=generator),
                "labels": torch.randint(3, 90, (6,), generator=generator),
            }
            for _ in range(40)
        ]
        target = {"encoder": 4, "decoder": 3}[part]
        trim = TrimConfig(target_layers=target, part=part, drop_every="2", repair="none", calibration_size=4)
        return TrimTrainer(model, arguments, train_dataset=data, trim=trim)

    whole = trainer(seq2seq(), "whole")
    whole.train()
    assert len(find_blocks(whole.model, part)) == {"encoder": 4, "decoder": 3}[part]
    assert LayerMap.from_config(whole.model.config).part == part
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = trainer(seq2seq(), "resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    trimmed = seq2seq()
    assert trim_like(trimmed, tmp_path / "whole" / "checkpoint-6").part == part
    assert len(find_blocks(trimmed, part)) == len(find_blocks(whole.model, part))


@pytest.mark.parametrize(("family", "part"), [("bart", "decoder"), ("bart", "encoder"), ("t5", "decoder")])
def test_only_the_kept_layers_of_a_part_are_loaded(tmp_path: Path, family: str, part: str) -> None:
    model = seq2seq(family)
    model.save_pretrained(tmp_path)
    kept = [layer for layer in range(len(find_blocks(model, part))) if layer not in (1, 3)]
    loaded = load_kept_layers(tmp_path, kept, AutoModelForSeq2SeqLM, part=part)
    drop_layers(model, [1, 3], part=part)
    assert torch.equal(logits(loaded), logits(model))
    assert LayerMap.from_config(loaded.config).kept_layers == tuple(kept)


def test_the_command_line_trims_a_part(tmp_path: Path) -> None:
    model = seq2seq()
    model.save_pretrained(tmp_path / "base")
    arguments = ["trim", "--drop", "1,3", "--part", "encoder", str(tmp_path / "base"), str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    drop_layers(model, [1, 3], part="encoder")
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")), logits(model))
