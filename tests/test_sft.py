"""TRL's SFTTrainer, unchanged but for the callback; and with TrimTrainerMixin. Packed sequences are scored as they train."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainerMixin, score_layers, trim_like

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")


class TrimSFTTrainer(TrimTrainerMixin, trl.SFTTrainer):
    """What README shows."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def texts(size: int = 200) -> Any:
    rng = random.Random(0)
    sentences = [" ".join(f"w{rng.randrange(90)}" for _ in range(rng.randrange(4, 14))) for _ in range(size)]
    return datasets.Dataset.from_dict({"text": sentences})


def sft(folder: Path, kind: str, lora: bool, packing: str | None, **changes: Any) -> Any:
    """An SFTTrainer whose run of 8 steps drops two of six layers."""
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_length=32,
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trim = TrimConfig(target_layers=4, drop_every="2", repair="none", calibration_size=8)
    common: dict[str, Any] = {
        "args": args,
        "train_dataset": texts(),
        "processing_class": tiny_tokenizer(),
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        **changes,
    }
    if kind == "callback":
        return trl.SFTTrainer(tiny_model(), **common, callbacks=[TrimCallback(trim)])
    return TrimSFTTrainer(tiny_model(), **common, trim=trim)


def of(trainer: Any, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


FAST = [("callback", False, "bfd"), ("callback", True, "bfd"), ("mixin", True, "wrapped")]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in product(["callback", "mixin"], [False, True], ["bfd", "wrapped", None])
]


@pytest.mark.parametrize(("kind", "lora", "packing"), CASES)
def test_trims_while_it_fine_tunes(kind: str, lora: bool, packing: str | None, tmp_path: Path) -> None:
    trainer = sft(tmp_path, kind, lora, packing)
    columns = set(trainer.train_dataset.column_names)
    assert ("seq_lengths" in columns) == (packing == "bfd")
    trainer.train()
    assert len(of(trainer, "loss")) == 8 and all(0 < loss < 10 for loss in of(trainer, "loss"))
    assert of(trainer, "trim/num_layers") == [5, 4]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}
    trainer.save_model(str(tmp_path / "final"))
    if lora:
        base = tiny_model()
        trim_like(base, tmp_path / "final")
        final = peft.PeftModel.from_pretrained(base, tmp_path / "final")
    else:
        final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        assert torch.equal(final.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.slow
def test_resume_ends_with_the_same_bits(lora: bool, tmp_path: Path) -> None:
    trainer = sft(tmp_path / "run", "mixin", lora, "bfd")
    trainer.train()
    again = sft(tmp_path / "again", "mixin", lora, "bfd")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))  # after the first drop
    expected, result = trainer.model.state_dict(), again.model.state_dict()
    assert result.keys() == expected.keys() and all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("packing", [None, "bfd"])
def test_packed_sequences_are_scored_as_if_each_stood_alone(packing: str | None, tmp_path: Path) -> None:
    """By hand: the model without the layer, one sequence at a time; the loss per token that has one before it."""
    trainer = sft(tmp_path, "mixin", False, packing)
    examples = [trainer.train_dataset[i] for i in range(6)]
    batches = [trainer.data_collator(examples[start : start + 2]) for start in (0, 2, 4)]
    assert ("position_ids" in batches[0]) == (packing == "bfd")
    scores = score_layers(tiny_model(), batches)
    sequences = []
    for example in examples:
        ids = torch.tensor(example["input_ids"])
        sequences += list(ids.split(example["seq_lengths"])) if packing else [ids]
    assert (len(sequences) > 6) == (packing == "bfd")
    for layer in range(6):
        model = tiny_model()
        del model.model.layers[layer]
        total = count = 0.0
        for ids in sequences:
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
        assert scores[layer].item() == pytest.approx(total / count, abs=1e-5)


def test_calibration_examples_that_are_not_tokenized_are_refused(tmp_path: Path) -> None:
    trainer = sft(tmp_path, "mixin", False, "bfd", calibration_dataset=texts(8))
    with pytest.raises(ValueError, match=r"processed like the training set, with its columns .*got \['text'\]"):
        trainer.train()
    assert trainer.model.config.num_hidden_layers == 6
