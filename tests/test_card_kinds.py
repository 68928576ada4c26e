"""The cards of other models than decoders that lost whole layers: where they load is tried, and the card says it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoder_decoder import seq2seq
from tiny import VOCABULARY, tiny_model, tiny_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, TrainingArguments

from trimllm_hf import LatencyReport, TrimConfig, TrimTrainer, drop_layers, write_card
from trimllm_hf.publish import pictures
from trimllm_hf.publish.card import CARD, REPORT, render
from trimllm_hf.publish.card_data import TrimCardData
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.measure import measure_for_card
from trimllm_hf.publish.model_check import check_model
from trimllm_hf.publish.pictures.card import depths_of
from trimllm_hf.publish.usage import run_example
from trimllm_hf.slicing.slice_model import slice_model
from trimllm_hf.surgery.remote_code import write_remote_code

FAST = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 2, "warmup": 0}
ASKED = TrimCardData(usage_prompt="w5 w6", domain="invented words")


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word is a token."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    fast.save_pretrained(folder)
    return fast


def trimmed(
    folder: Path, family: str, layers: list[int], unit: str = "block", dtype: Any = torch.float32, **settings: Any
) -> Path:
    """A folder of a model that lost layers, in float32, with its tokenizer; the base lies beside it."""
    save_tokenizer(folder)
    made = tiny_model(family, **settings)
    made.to(dtype).save_pretrained(base := f"{folder}-base")
    model = type(made).from_pretrained(base, dtype=torch.float32)
    drop_layers(model, layers, unit=unit)
    model.save_pretrained(folder)
    return folder


def loads_in(text: str) -> dict[str, str]:
    """The table of where the model loads."""
    rows = text.split("| loads in | |\n|---|---|\n")[1].splitlines()[:3]
    cells = (row.strip("|").split("|") for row in rows)
    return {what.replace("`", "").strip(): said.strip() for what, said in cells}


def report_of(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((folder / REPORT).read_text())
    assert render(TrimCardData.from_report(plain)) == (folder / CARD).read_text()
    return plain


@pytest.mark.slow
def test_halves_of_blocks(tmp_path: Path) -> None:
    """The strip shows halves; the example runs with the package and, by the code beside the weights, without it."""
    folder = trimmed(tmp_path / "halves", "llama", [5, 8], unit="sublayer")
    text = write_card(folder, ASKED, measured=False).read_text()
    assert "██▀█▄█" in text and "# halves-base-trim-10of12-sublayers" in text
    assert (
        "The attention or the MLP of some layers was taken out (" in text
        and "| attentions and MLPs | 12 | 10 | -17% |" in text
    )
    assert loads_in(text) == {
        "stock transformers": "no: it does not know blocks that lack a sublayer, and it says so",
        "with trimllm_hf": "needed",
        "trust_remote_code": "no: its code is not beside the weights (`write_remote_code` puts it there)",
    }
    file = write_remote_code(folder)
    assert file.name in contents_of(folder).sizes  # a push takes it along
    text, report = write_card(folder, **FAST).read_text(), report_of(folder)
    assert "import trimllm_hf  # registers" in text and report["usage"]["output"].startswith("w5 w6")
    loads = loads_in(text)
    assert loads["with trimllm_hf"] == "yes: the example ran"
    assert loads["trust_remote_code"] == "yes: the example ran so, without `trimllm_hf`"

    (folder / REPORT).unlink()  # what ran before was other code
    ran = tmp_path / "ran"
    file.write_text(f"open({str(ran)!r}, 'w').close()\n{file.read_text()}")  # by someone else, or changed by hand
    loads = loads_in(write_card(folder, **FAST).read_text())
    assert loads["trust_remote_code"].startswith("not run: the code beside the weights is not trimllm_hf's")
    assert not ran.exists()
    write_card(folder, trust_remote_code=True, **FAST)
    assert ran.exists()

    file.write_text("import no_such_module\n")
    told = run_example(folder, "text-generation", "w5", stock=True, remote_code=True)["not_run"]
    report["usage"]["remote_code"] = told
    assert "no_such_module" in told
    assert loads_in(render(TrimCardData.from_report(report)))["trust_remote_code"] == f"no: the example failed so ({told})"


def test_an_encoder(tmp_path: Path) -> None:
    """It is timed per batch, and classifies in stock transformers."""
    folder = trimmed(tmp_path / "encoder", "bert", [1, 3, 4])
    text = write_card(folder, ASKED, **FAST).read_text()
    assert "forward pass, batch 1" in text and "tokens/s" not in text and "KV cache" not in text
    assert 'pipeline("text-classification", "encoder-base-trim-3of6")' in text and "█░█░░█" in text
    assert loads_in(text)["stock transformers"] == "yes: the example ran without `trimllm_hf`"
    assert "LABEL_" in report_of(folder)["usage"]["output"]


@pytest.mark.parametrize(("family", "part"), [("t5", "decoder"), pytest.param("bart", "encoder", marks=pytest.mark.slow)])
def test_an_encoder_decoder(family: str, part: str, tmp_path: Path) -> None:
    """It is timed as it generates, the encoder with the first token, and writes in stock transformers."""
    folder = tmp_path / "two"
    save_tokenizer(folder)
    seq2seq(family).save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    drop_layers(model, [1, 3], part=part)
    model.save_pretrained(folder)
    text, report = write_card(folder, ASKED, **FAST).read_text(), report_of(folder)
    assert ("3 of its 5 decoder layers" if part == "decoder" else "4 of its 6 encoder layers") in text
    assert "decoding, batch 1" in text and "by weight bytes" not in text and "█░█░█" in text
    assert report["latency"]["runs"][0]["decode_ms_per_token"]["n"] == FAST["repeats"]
    assert report["latency"]["sizes"]["kv_cache_bytes_per_token"] == 2 * (3 if part == "decoder" else 5) * 32 * 4
    assert loads_in(text)["stock transformers"] == "yes: the example ran without `trimllm_hf`"
    assert "AutoModelForSeq2SeqLM" in report["usage"]["code"]


@pytest.mark.slow
def test_an_adapter_is_merged_and_then_has_a_card(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    args = TrainingArguments(
        str(tmp_path / "adapter"), max_steps=6, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    trim = TrimConfig(target_layers=4, importance="sensitivity", repair="none", calibration_size=8, drop_every="2")
    trainer = TrimTrainer(model, args, trim=trim, train_dataset=tiny_texts(40))
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match=r"holds an adapter: merge it into its trimmed base \(merge_and_unload\)"):
        contents_of(tmp_path / "adapter")

    folder = tmp_path / "merged"
    save_tokenizer(folder)
    trainer.model.merge_and_unload().save_pretrained(folder)
    text = write_card(folder, ASKED, **FAST).read_text()
    layer_map = check_model(contents_of(folder))
    assert layer_map.num_layers == 4 and len(report_of(folder)["trimmed"]["map"]["history"]) == 2
    assert loads_in(text)["stock transformers"] == "yes: the example ran without `trimllm_hf`"
    assert "4 of its 6 layers kept" in text and "times as fast" in text


def measured_beside_its_base(folder: Path) -> TrimCardData:
    return replace(ASKED, latency=measure_for_card(folder, f"{folder}-base", **FAST))


def of_one_layer_each(folder: Path) -> tuple[dict[str, Any], LatencyReport]:
    """The report on a card. Its picture of other depths agrees with the table where they meet, and is possible."""
    report = report_of(folder)
    latency = LatencyReport.from_dict(report["latency"])
    depths = {depth.num_layers: depth for depth in depths_of(TrimCardData.from_report(report))}
    kept = depths[latency.sizes.num_layers]
    assert kept.byte_bound == pytest.approx(latency.speedup("decode").byte_bound)
    assert (kept.parameters, kept.weight_bytes) == (latency.sizes.parameters, latency.sizes.weight_bytes)
    assert all(0 < depth.weight_bytes <= latency.base_sizes.weight_bytes for depth in depths.values())
    return report, latency


def test_a_gain_far_beyond_the_ratio_of_bytes_contradicts_nothing(tmp_path: Path) -> None:
    """A tied head far heavier than the layers: nearly all bytes stay, and nearly half of the time goes."""
    layers = {"num_hidden_layers": 12, "vocab_size": 30000, "tie_word_embeddings": True}
    folder = trimmed(tmp_path / "heavy", "llama", [2, 3, 4, 5, 6, 7], **layers)
    write_card(folder, measured_beside_its_base(folder), measured=False)
    report, latency = of_one_layer_each(folder)
    ratio = latency.speedup("decode").byte_bound
    assert 1 < ratio < 1.1
    for speedup in report["latency"]["speedups"]:
        speedup |= {"ratio": 1.85, "low": 1.8, "high": 1.9}  # as it was measured where nothing else ran
    text = render(TrimCardData.from_report(report))
    assert f"1.85 [1.80, 1.90] times as fast; {ratio:.2f} by weight bytes" in text
    assert "a layer costs more than its bytes where they are few" in text and "at most" not in text
    figure = pictures.what_if_figure(depths_of(TrimCardData.from_report(report)), 6)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[0] == "bytes a token, all layers / these" and not any("fast" in label for label in labels)


def test_a_base_of_another_type_of_numbers(tmp_path: Path) -> None:
    """The trimmed file is larger than the base's, and fewer bytes are read: it says that both are measured in one type."""
    folder = trimmed(tmp_path / "wide", "llama", [2, 3, 4], dtype=torch.bfloat16)
    text = write_card(folder, measured_beside_its_base(folder), measured=False).read_text()
    of_one_layer_each(folder)
    assert "| weights on disk (BF16 and F32) | 123.84 kB | 136.32 kB | +10% |" in text
    assert "1.90 by weight bytes" in text and "both models in float32, attention" in text


@pytest.mark.parametrize("kind", ["halves", "widths"])
def test_layers_and_more_went(kind: str, tmp_path: Path) -> None:
    """What other depths weigh does not follow from it, and no other reader knows such a model."""
    folder = trimmed(tmp_path / "more", "llama", [3])
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind == "halves":
        drop_layers(model, [2, 3, 5, 6, 8], unit="sublayer")
    else:
        batches = [{"input_ids": text["input_ids"][None]} for text in tiny_texts(8)]
        slice_model(model, batches, 0.4, multiple=1, progress=False)
    model.save_pretrained(folder)
    text = write_card(folder, ASKED, **FAST).read_text()
    report = report_of(folder)
    assert report["latency"]["base_sizes"]["num_layers"] == 6 and "by weight bytes" in text
    assert not depths_of(TrimCardData.from_report(report)) and pictures.WHAT_IF not in report["pictures"]
    assert not (folder / pictures.WHAT_IF).exists() and "other depths" not in text
    lacking = {"halves": "blocks that lack a sublayer", "widths": "layers of different widths"}[kind]
    assert loads_in(text) == {
        "stock transformers": f"no: it does not know {lacking}, and it says so",
        "with trimllm_hf": "yes: the example ran",
        "trust_remote_code": "no: its code is not beside the weights (`write_remote_code` puts it there)",
    }
    others = report["trimmed"]["readers"]
    assert len(others) == 4 and {each["verdict"] for each in others} == {"not right"}
    assert all(each["reason"] == f"it does not know {lacking}, and says so" for each in others)


def test_measuring_shows_how_far_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = trimmed(tmp_path / "slow", "llama", [2, 3])
    measure_for_card(folder, f"{folder}-base", progress=True, **FAST)
    shown = capfd.readouterr().err
    assert "Measuring latency" in shown and "100%" in shown and "2/2" in shown
    measure_for_card(folder, f"{folder}-base", **FAST)
    assert "Measuring latency" not in capfd.readouterr().err
