"""Layers are scored by the Trainer's own loss, whatever its batches hold, and scoring leaves no trace in the Trainer."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts, tokens
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    HubertConfig,
    HubertForCTC,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    default_data_collator,
)
from transformers.utils import logging

from trimllm_hf import TrimCallback, TrimConfig, drop_layers, score_layers

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def strong(model: Any) -> Any:
    """A model each of whose layers counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


# ---- preferences: two rows an example, a loss over pairs, a reference model, metrics


class PairTrainer(Trainer):
    """As TRL's DPOTrainer goes about it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = copy.deepcopy(self.model).eval()
        self._metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.num_seen = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        ids = inputs["pairs"].flatten(0, 1)
        with torch.no_grad():
            of_reference = log_likelihood(self.reference(input_ids=ids).logits, ids)
        gain = (log_likelihood(model(input_ids=ids).logits, ids) - of_reference).view(-1, 2)
        loss = -logsigmoid(0.1 * (gain[:, 0] - gain[:, 1])).mean()
        self._metrics["train" if self.model.training else "eval"]["margin"].append(gain.mean().item())
        self.num_seen += len(ids)
        self.log({"margin": gain.mean().item()})
        return loss


def log_likelihood(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))


def pairs() -> list[Any]:
    ids = tokens(24, 10)
    return [{"pairs": ids[i : i + 2]} for i in range(0, 24, 2)]


def loss_of_pairs(model: Any, examples: list[Any]) -> float:
    whole, losses = tiny_model(), []
    for example in examples:
        ids = example["pairs"]
        gain = log_likelihood(model(input_ids=ids).logits, ids) - log_likelihood(whole(input_ids=ids).logits, ids)
        losses.append(-logsigmoid(0.1 * (gain[0] - gain[1])).item())
    return sum(losses) / len(losses)


# ---- other tasks


def answers() -> list[Any]:
    return [{"input_ids": ids, "start_positions": i % 5, "end_positions": 5 + i % 5} for i, ids in enumerate(tokens(12, 12))]


def reader() -> Any:
    torch.manual_seed(0)
    return strong(BertForQuestionAnswering(BertConfig(vocab_size=97, **SMALL)))


def images() -> list[Any]:
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator(i)), "labels": i % 3} for i in range(12)]


def seer() -> Any:
    torch.manual_seed(0)
    return strong(ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)))


def sounds() -> list[Any]:
    features = [torch.randn(16, 40, generator=generator(i)) for i in range(12)]
    return [{"input_features": feature, "labels": ids} for feature, ids in zip(features, tokens(12, 6), strict=True)]


def listener() -> Any:
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in LAYERS.items()}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    return strong(WhisperForConditionalGeneration(WhisperConfig(vocab_size=97, d_model=32, **sizes, **ids, **lengths)))


def speech() -> list[Any]:
    waves = [torch.randn(400, generator=generator(i)) for i in range(12)]
    return [{"input_values": wave, "labels": torch.tensor([3, 5 + i, 4, 6])} for i, wave in enumerate(waves)]


def transcriber(kind: Any, config: Any) -> Any:
    def make() -> Any:
        torch.manual_seed(0)
        front = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        return kind(config(vocab_size=32, **SMALL, **front, **places, ctc_loss_reduction="mean", layerdrop=0.0)).eval()

    return make


LAYERS = {"layers": 4, "attention_heads": 4, "ffn_dim": 64}
IMAGE = 151


def scenes() -> list[Any]:
    """Questions about an image, which is 16 patches and four tokens."""
    rows = []
    for i in range(8):
        ids = torch.tensor([1, 5, 153, *[IMAGE] * 4, 154, 7, 3 + i, 50 + i])
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator(i))
        labels = ids.clone()
        labels[:-2] = -100
        rows.append({"input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": pixels})
    return rows


def of_scenes(rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "pixel_values"}
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return {**batch, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(rows))}


def onlooker() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SMALL, "vocab_size": 200, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    ids = {"image_token_id": IMAGE, "video_token_id": 152, "vision_start_token_id": 153, "vision_end_token_id": 154}
    return strong(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)))


class Weighing(Trainer):
    """Examples of different weight."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        weights, labels = inputs.pop("weight"), inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        return (cross_entropy(logits, labels[:, 1:], reduction="none").mean(dim=1) * weights).mean()


def weighed() -> list[Any]:
    return [{**row, "weight": float(i % 3)} for i, row in enumerate(tiny_texts(12))]


def loss_of_weighed(model: Any, examples: list[Any]) -> float:
    losses = [
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item() * row["weight"] for row in examples
    ]
    return sum(losses) / len(losses)


def own_loss(model: Any, examples: list[Any]) -> float:
    losses = [model(**default_data_collator([row])).loss.item() for row in examples]
    return sum(losses) / len(losses)


@dataclass
class Case:
    model: Any
    data: Any
    by_hand: Any = own_loss
    trainer: Any = Trainer
    collate: Any = default_data_collator
    trim: dict[str, Any] = field(default_factory=dict)
    swept: bool = True


CASES = {
    "preferences": Case(tiny_model, pairs, loss_of_pairs, PairTrainer),
    "question answering": Case(reader, answers),
    "images": Case(seer, images),
    "audio, its decoder": Case(listener, sounds, trim={"part": "decoder"}),
    "audio, its encoder": Case(listener, sounds, trim={"part": "encoder"}),
    "speech, CTC": Case(transcriber(Wav2Vec2ForCTC, Wav2Vec2Config), speech),
    "speech, HuBERT": Case(transcriber(HubertForCTC, HubertConfig), speech),
    "images in a text": Case(
        onlooker, scenes, lambda m, rows: sum(m(**of_scenes([row])).loss.item() for row in rows) / len(rows),
        collate=of_scenes, swept=False,
    ),
    "weighed examples": Case(tiny_model, weighed, loss_of_weighed, Weighing),
}  # fmt: skip


def train(case: Case, folder: Path, examples: Any = None, of_trainer: Any = None, **trim: Any) -> Any:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, logging_steps=1, **{"max_steps": 2, **(of_trainer or {})},
    )  # fmt: skip
    data, model = case.data(), case.model()
    settings = {"drop_every": "once", "target_layers": depth_of(model) - 1, "importance": "sensitivity"}
    settings |= {"warm_up_importance": "none", "repair": "none"}
    config = TrimConfig(**{**settings, **case.trim, **trim})
    callback = TrimCallback(config, calibration_dataset=examples or data[:7])
    return case.trainer(model, arguments, train_dataset=data, data_collator=case.collate, callbacks=[callback])


def depth_of(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "num_hidden_layers", 0) or config.encoder_layers


def some(*fast: str) -> list[Any]:
    """The cases, all but a few marked as slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", some("preferences", "images", "images in a text"))
def test_layers_are_scored_by_the_trainers_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, warned = CASES[name], []
    monkeypatch.setattr(
        logging.get_logger("transformers.trimllm_hf"), "warning_once", lambda message, *_: warned.append(message)
    )
    trainer = train(case, tmp_path)
    trainer.train()
    (record,) = trainer.model.config.trim["history"]
    scores = []
    for position in range(1, depth_of(case.model()) - 1):
        smaller = case.model()
        drop_layers(smaller, [position], part=case.trim.get("part"))
        with torch.no_grad():
            scores.append(case.by_hand(smaller, case.data()[:7]))
    assert record["scores"] == [pytest.approx(min(scores), rel=1e-4)]
    assert record["dropped"] == [1 + scores.index(min(scores))]
    assert bool(warned) is not case.swept


@pytest.mark.parametrize("importance", ["block_influence", "angular", "taylor"])
@pytest.mark.parametrize("name", some("images in a text"))
def test_other_scores_take_the_trainers_batches(name: str, importance: str, tmp_path: Path) -> None:
    trainer = train(CASES[name], tmp_path, importance=importance)
    trainer.train()
    assert trainer.model.config.trim["history"][0]["importance"] == importance and trainer.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speech, CTC", "speech, HuBERT", "images"])
def test_the_defaults_take_what_is_no_text(name: str, tmp_path: Path) -> None:
    defaults = TrimConfig(target_layers=3)
    settings = {"importance": defaults.importance, "warm_up_importance": defaults.warm_up_importance}
    trainer = train(CASES[name], tmp_path, **settings, repair=defaults.repair, repair_tokens=64)
    trainer.train()
    assert trainer.state.global_step == 2 and depth_of(trainer.model) == 3


def test_scoring_leaves_no_trace(tmp_path: Path) -> None:
    trainer = train(CASES["preferences"], tmp_path, drop_every="1")
    metrics, random = trainer._metrics, []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            random.append(torch.get_rng_state().sum().item())

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer._metrics is metrics and not metrics["eval"] and len(metrics["train"]["margin"]) == 2
    assert trainer.num_seen == 2 * 4 * 2 and "log" not in vars(trainer)
    assert sum("margin" in entry and "trim/num_layers" not in entry for entry in trainer.state.log_history) == 2


# ---- a Trainer that generates what it trains on


class Rollouts(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(input_ids=inputs["ids"], labels=inputs["ids"]).loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        assert self.model.training, "rollouts were made for a score"
        return {"ids": tokens(len(inputs))}


class Words:
    """Stands for a tokenizer: a letter is a token."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor([ord(letter) - 90 for letter in text]) for text in texts], True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


PROMPTS = [{"prompt": "tell me"[: 3 + i % 5].replace(" ", "a")} for i in range(12)]
ROLLOUTS = Case(tiny_model, lambda: PROMPTS, trainer=Rollouts, collate=lambda rows: rows)


def test_a_loss_of_rollouts_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = train(ROLLOUTS, tmp_path)
    trainer.processing_class = Words()
    with pytest.raises(ValueError, match=r"got Rollouts, which generates what it trains on"):
        trainer.train()
    assert trainer.state.global_step == 0 and len(trainer.model.model.layers) == 6


def test_statistics_of_prompts(tmp_path: Path) -> None:
    trainer = train(ROLLOUTS, tmp_path, importance="block_influence")
    trainer.processing_class = Words()
    trainer.train()
    batches = [Words()([row["prompt"] for row in PROMPTS[i : min(i + 4, 7)]]) for i in (0, 4)]
    scores = score_layers(tiny_model(), batches, "block_influence")[1:-1]
    (record,) = trainer.model.config.trim["history"]
    assert record["scores"] == [pytest.approx(scores.min().item())] and record["dropped"] == [1 + int(scores.argmin())]


# ---- the Trainer's metrics


@pytest.mark.parametrize("how", ["inputs and losses", "batch by batch"])
def test_a_scan_by_compute_metrics_as_the_trainer_calls_it(how: str, tmp_path: Path) -> None:
    hits: list[torch.Tensor] = []

    def compute_metrics(found: Any, compute_result: bool = True) -> dict[str, float]:
        if how == "batch by batch":
            assert isinstance(found.predictions, torch.Tensor)
            hits.append((found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]).float().flatten())
            if not compute_result:
                return {}
            share = torch.cat(hits).mean().item()
            hits.clear()
            return {"share": share}
        assert len(found.losses) == len(found.inputs) == len(found.predictions)
        return {"share": float((found.predictions[:, :-1].argmax(-1) == found.inputs[:, 1:]).mean())}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
        **({"batch_eval_metrics": True} if how == "batch by batch" else {"include_for_metrics": ["inputs", "loss"]}),
    )  # fmt: skip
    trim = TrimConfig(target_layers=5, drop_every="once", warm_up_importance="none", scan_metric="share")
    model, rows = tiny_model(), tiny_texts(8, length=40)
    callback = TrimCallback(trim, calibration_dataset=rows)
    trainer = Trainer(model, arguments, train_dataset=tiny_texts(), compute_metrics=compute_metrics, callbacks=[callback])
    trainer.train()
    shares, ids = [], torch.stack([row["input_ids"] for row in rows])
    for position in range(1, 5):
        smaller = tiny_model()
        drop_layers(smaller, [position])
        with torch.no_grad():
            shares.append((smaller(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item())
    (record,) = model.config.trim["history"]
    assert record["scores"] == [pytest.approx(-max(shares))]


# ---- batches that fit


class Hungry(Trainer):
    """Has memory for three rows."""

    trained: list[int]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_scan_takes_the_batch_size_that_was_found(tmp_path: Path) -> None:
    case = Case(tiny_model, tiny_texts, trainer=Hungry)
    trainer = train(
        case, tmp_path, of_trainer={"auto_find_batch_size": True, "max_steps": 3}, drop_every="1", target_layers=4
    )
    rows: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: None if model.training else rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert trainer.state.global_step == 3 and len(trainer.model.model.layers) == 4
    assert rows[-1] <= 3 and 4 in rows  # it began with 4
