"""The card: a pure function of its report, which holds what was measured and nothing of the machine; hands' edits stay."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import VOCABULARY, tiny_model, tiny_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from trimllm_hf import LatencyReport, LayerMap, TrimCardData, TrimConfig, TrimTrainer, drop_layers, write_card
from trimllm_hf.publish import card as card_module
from trimllm_hf.publish import pictures
from trimllm_hf.publish.card import CARD, REPORT, merged, render
from trimllm_hf.publish.card_check import check_card
from trimllm_hf.publish.card_data import DataUse, Quality, Score
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.usage import run_example
from trimllm_hf.training.run_summary import command, shared_examples

TEST = Quality("accuracy", Score.of_share(0.75, 480), "invented questions", "test", 480, base=Score.of_share(0.25, 480))
FAST = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 2, "warmup": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrimTrainer, Path]:
    """A run from 6 to 3 layers with evaluations between, its model saved; the base is a local folder."""
    folder = tmp_path_factory.mktemp("card")
    tiny_model().save_pretrained(folder / "base")
    model = type(tiny_model()).from_pretrained(folder / "base")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    args = TrainingArguments(
        str(folder / "run"), max_steps=8, eval_strategy="steps", eval_steps=2, eval_on_start=True, logging_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, hub_token="hf_not_for_the_card",
    )  # fmt: skip
    texts = tiny_texts(60)
    trainer = TrimTrainer(
        model,
        args,
        trim=TrimConfig(target_layers=3, importance="sensitivity", repair="none", calibration_size=8, drop_every="2"),
        train_dataset=texts[:50],
        eval_dataset=texts[50:] + texts[:1],
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0"),
        card_data=TrimCardData(domain="invented words", language="en", usage_prompt="w5 w6"),
    )
    trainer.create_model_card()  # before anything is dropped or saved, there is nothing to write of
    assert not (folder / "run" / CARD).exists()
    trainer.train()
    trainer.save_model()
    return trainer, folder / "run"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of a model that lost layers without any training."""
    model = tiny_model()
    model.config.trim = LayerMap(6, tuple(range(6)), base_model="org/base", base_revision="a" * 40).to_dict()
    drop_layers(model, [2, 3])
    model.save_pretrained(tmp_path)
    return tmp_path


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT).read_text())


def metadata_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_saving_writes_the_card_of_the_run_without_measuring(trained: tuple[TrimTrainer, Path]) -> None:
    trainer, folder = trained
    text, report = (folder / CARD).read_text(), report_of(folder)
    assert "with 3 of its 6 layers kept, fine-tuned for invented words; 8 training steps, the last 2" in text
    assert report["trimmed"]["weights"]["parameters"] == trainer.model.num_parameters()
    assert report["base"]["weights"]["parameters"] == tiny_model().num_parameters()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert report["trimmed"]["sha256"]["model.safetensors"] == digest and digest in text
    assert report["training"]["examples"] == {"training": 42, "calibration": 8, "evaluation": 11}
    assert report["training"]["calibration"] == "set aside"
    assert report["training"]["shared_examples"]["training and calibration"] == 0
    assert sum(report["training"]["shared_examples"].values()) == 1  # the one that was put into both on purpose
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    (quality,) = report["quality"]
    assert (quality["base"]["value"], quality["trimmed"]["value"]) == (evaluations[0], evaluations[-1])
    assert "Speed and memory: not measured." in text and "No example was run." in text
    assert render(TrimCardData.from_report(report)) == text, "the card is not a function of its report"


def test_after_training_a_card_is_measured_and_its_example_run_without_this_package(
    trained: tuple[TrimTrainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, folder = trained
    measure = card_module.measure_for_card
    monkeypatch.setattr(card_module, "measure_for_card", lambda *args, **kwargs: measure(*args, **kwargs, **FAST))
    trainer.create_model_card(model_name="three-layers", tags="mine")
    text, report = (folder / CARD).read_text(), report_of(folder)
    latency = LatencyReport.from_dict(report["latency"])
    assert (latency.base_sizes.num_layers, latency.sizes.num_layers) == (6, 3)
    decode = latency.speedup("decode")
    assert f"{decode.ratio:.2f} [{decode.low:.2f}, {decode.high:.2f}] times as fast; 1.90 by weight bytes" in text
    assert report["usage"]["stock"] and report["usage"]["output"].startswith("w5 w6")
    assert report["usage"]["output"] in text and 'pipeline("text-generation", "three-layers")' in text
    assert metadata_of(text)["tags"] == ["mine", "trimmed", "pruned", "layer-pruning"]
    assert render(TrimCardData.from_report(report)) == text
    trainer.save_model()  # the same weights: what was measured stays
    assert report_of(folder)["latency"] == report["latency"] and report_of(folder)["usage"] == report["usage"]


def test_a_trainer_shows_how_far_measuring_is(trained: tuple[TrimTrainer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trained
    shown: list[bool] = []
    monkeypatch.setattr("trimllm_hf.training.card_mixin.write_card", lambda *_, **how: shown.append(how["progress"]))
    for quiet in (True, False):
        monkeypatch.setattr(trainer.args, "disable_tqdm", quiet)
        trainer.create_model_card()
    assert shown == [False, True]


def test_of_the_training_arguments_the_card_tells_what_is_not_the_default(trained: tuple[TrimTrainer, Path]) -> None:
    told = report_of(trained[1])["training"]["arguments"]
    given = {"disable_tqdm", "eval_on_start", "eval_steps", "eval_strategy", "logging_steps", "output_dir", "save_strategy"}
    first = {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "optim"}
    first |= {"num_train_epochs", "max_steps", "seed", "weight_decay", "warmup_steps"}
    assert set(told) == given | first | {"use_cpu", "dataloader_pin_memory", "do_eval"}  # the last two follow from others
    assert (told["max_steps"], told["eval_steps"], told["use_cpu"]) == (8, 2, True)


def test_nothing_of_the_machine_and_no_secret_stands_in_card_or_report(trained: tuple[TrimTrainer, Path]) -> None:
    _, folder = trained
    for name in (CARD, REPORT):
        text = (folder / name).read_text()
        assert str(folder.parent) not in text and str(Path.cwd()) not in text and "hf_not_for" not in text
    text = (folder / CARD).read_text()
    for left_over in ("None", "nan", "Undefined", "More Information Needed", "MODEL_ID", "{{", "{%"):
        assert left_over not in text


def test_pictures_are_drawn_and_shown(trained: tuple[TrimTrainer, Path]) -> None:
    trainer, folder = trained
    text = (folder / CARD).read_text()
    for name in (pictures.STRIP, pictures.IMPORTANCE, pictures.CURVE, pictures.LOSS, pictures.WHAT_IF):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    curve = pictures.curve_of(TrimCardData.from_report(report_of(folder)))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert curve.points == tuple(zip([6, 5, 4, 3, 3], losses, strict=True))


def test_without_matplotlib_the_card_says_so(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures.card, "find_spec", lambda name: None)
    text = write_card(saved, measured=False).read_text()
    assert "no pictures: matplotlib was not installed" in text and ".png" not in text
    assert not list(saved.glob("*.png")) and "██░░██" in text


def test_metadata_are_what_the_hub_takes(saved: Path) -> None:
    data = TrimCardData(
        quality=[replace(TEST, trimmed=Score(np.float32(0.75)), dataset_id="org/data", revision="b" * 40)],
        data=[DataUse("training", "words", dataset_id="org/data"), DataUse("test", "more", dataset_id="org/more")],
        license="mit",
        model_name="mine",
    )
    text = write_card(saved, data, measured=False).read_text()
    metadata = metadata_of(text)  # safe_load: no Python object among them
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert {"trimmed", "pruned"} <= set(metadata["tags"]) and metadata["datasets"] == ["org/data"]
    (result,) = metadata["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.75], "a score that is not this model's"
    assert metadata["license"] == "mit" and "inherited" not in text
    check_card(contents_of(saved), LayerMap.from_checkpoint(saved))  # what a push checks before it asks the Hub
    assert "[org/base](https://huggingface.co/org/base)@`aaaaaaaaaaaa`" in text


def test_a_local_base_gives_no_base_model_and_the_card_says_so(trained: tuple[TrimTrainer, Path]) -> None:
    text = (trained[1] / CARD).read_text()
    assert "base_model" not in metadata_of(text) and "names no `base_model`" in text
    assert "The base's licence is not known" in text


def test_the_licence_is_the_base_s(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(base)
    (base / CARD).write_text("---\nlicense: other\nlicense_name: some\nlicense_link: LICENSE\n---\n# Base\n")
    text = write_card(saved, base=str(base), measured=False).read_text()
    metadata = metadata_of(text)
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "some", "LICENSE")
    assert "inherited from the base" in text and "base_model" not in metadata


def test_what_a_hand_wrote_is_kept(saved: Path) -> None:
    path = write_card(saved, TrimCardData(domain="words"), measured=False)
    text = path.read_text()
    text = text.replace("tags:\n", "extra_gated_prompt: be kind\ntags:\n- by-hand\n")
    text = text.replace("<!-- /trimllm_hf: limits -->", "<!-- /trimllm_hf: limits -->\n\nMy own words.")
    begin, end = text.index("<!-- trimllm_hf: data -->"), text.index("<!-- trimllm_hf: limits -->")
    path.write_text(text[:begin] + text[end:])  # a section taken out, with its marks
    text = write_card(saved, TrimCardData(domain="other words", quality=[TEST]), measured=False).read_text()
    assert "My own words." in text and "trimllm_hf: data" not in text
    assert "fine-tuned for other words" in text and "0.750 [0.709, 0.787]" in text
    metadata = metadata_of(text)
    assert "by-hand" in metadata["tags"] and metadata["extra_gated_prompt"] == "be kind"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert text.count("<!-- trimllm_hf: cost -->") == 1


def test_a_card_without_our_marks_is_kept_and_ours_follows(saved: Path) -> None:
    (saved / CARD).write_text("---\nlicense: mit\n---\n# My model\n\nAll about it.\n")
    text = write_card(saved, measured=False).read_text()
    assert text.index("All about it.") < text.index("trimllm_hf: summary") and metadata_of(text)["license"] == "mit"
    assert write_card(saved, measured=False).read_text() == text


def test_figures_of_other_weights_are_left_out(saved: Path) -> None:
    write_card(saved, TrimCardData(domain="words", quality=[TEST]), measured=False)
    assert report_of(saved)["quality"]
    model = tiny_model(seed=1)
    model.config.trim = LayerMap(6, tuple(range(6)), base_model="org/base").to_dict()
    drop_layers(model, [1])
    model.save_pretrained(saved)
    text = write_card(saved, measured=False).read_text()
    assert report_of(saved)["quality"] == [] and "0.750" not in text and "words" in text
    assert "model-index" not in metadata_of(text) and "with 5 of its 6 layers" in text


def test_what_cannot_be_measured_is_said(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "run_example", lambda *args, **kwargs: run_example(*args, **kwargs, timeout=0.01))
    text = write_card(saved, prompt_tokens=80, new_tokens=4).read_text()  # the model has 64 positions
    # neither can the base's config be had without network, nor the example be run in no time
    assert "Speed and memory: not measured (" in text and str(saved) not in text
    assert "No example was run: it took more than 0 s." in text
    assert run_example(saved, "image-to-text", None, stock=True) == {"not_run": "there is no example for image-to-text"}


def test_a_model_that_lacks_halves_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock transformers cannot load it, and the card says what can; speed is that of the model without the halves."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    drop_layers(model, [5, 8], unit="sublayer")  # the MLP of 2, the attention of 4
    drop_layers(model, [3])
    model.save_pretrained(tmp_path / "trimmed")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        card_module, "run_example", lambda *args, **kwargs: asked.update(kwargs) or {"not_run": "tested above"}
    )
    path = write_card(tmp_path / "trimmed", **FAST)
    text, report = path.read_text(), report_of(tmp_path / "trimmed")
    assert asked == {"stock": False}
    assert "██▀░▄█" in text and "the mlp of 2, the attention of 4" in text
    assert "5 of its 6 layers (1 of them without attention, 1 of them without mlp) kept" in text
    assert "needs `trimllm_hf`" in text or "blocks that lack a sublayer" in text
    assert report["latency"]["sizes"]["parameters"] == model.num_parameters() == report["trimmed"]["weights"]["parameters"]
    assert (path.parent / pictures.STRIP).is_file() and render(TrimCardData.from_report(report)) == text


def test_a_model_that_is_not_trimmed_or_damaged_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(OSError):
        write_card(tmp_path / "nowhere", measured=False)
    (saved / REPORT).write_text("{")
    with pytest.raises(ValueError, match=r"Expected JSON in .*trim_report.json"):
        write_card(saved, measured=False)
    (saved / REPORT).write_text('{"version": 99}')
    with pytest.raises(ValueError, match="Expected a trim report of version 1, got 99"):
        write_card(saved, measured=False)
    (saved / REPORT).write_text('{"version": 1}')
    with pytest.raises(ValueError, match="a damaged one"):
        write_card(saved, measured=False)
    tiny_model().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="Expected a trimmed model"):
        write_card(tmp_path / "full", measured=False)


@pytest.mark.parametrize(("share", "n"), [(0.75, 480), (0.0, 10), (1.0, 3), (0.5, 1)])
def test_wilsons_interval_holds_the_shares_from_which_the_seen_one_is_95_percent_likely(share: float, n: int) -> None:
    score = Score.of_share(share, n)
    for end in (score.low, score.high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / n), rel=1e-6)
    assert 0 <= score.low <= share <= score.high <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite number as value of a score"):
        Score(value)


def test_commands_lose_their_secrets_and_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    argv = [
        str(tmp_path / "train.py"),
        "--hub_token",
        "hf_x",
        "--token=hf_y",
        "--out",
        str(tmp_path / "runs/a"),
        "--data=/mnt/d",
    ]
    assert command([*argv, "--include_num_input_tokens_seen"]) == (
        "python train.py --out runs/a --data=d --include_num_input_tokens_seen"
    )
    assert command(["-c"]) is None and command([""]) is None


def test_examples_in_common_are_counted_by_their_tokens() -> None:
    texts = tiny_texts(6)
    sets = {"training": texts[:4], "calibration": texts[4:], "evaluation": texts[3:5], "other": None}
    assert shared_examples(sets) == {
        "training and calibration": 0, "training and evaluation": 1, "calibration and evaluation": 1
    }  # fmt: skip
    assert shared_examples({"training": [{"x": 1}], "evaluation": texts}) is None


def test_merging_changes_nothing_where_nothing_was_changed() -> None:
    assert merged(None, "new", None) == "new"
    assert merged("old", "new", "old") == "new"


class NoNetwork(Exception):
    """As httpx's errors are: of no built-in kind."""


NoNetwork.__module__ = "httpx2"


def test_no_network_costs_a_card_what_the_base_says_and_nothing_else(
    trained: tuple[TrimTrainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[1], folder, ignore=shutil.ignore_patterns(CARD, REPORT))

    def fail(*args: object, **kwargs: object) -> None:
        raise NoNetwork("no route to host")

    monkeypatch.setattr("trimllm_hf.publish.folder.cached_file", fail)
    monkeypatch.setattr("trimllm_hf.publish.folder.get_safetensors_metadata", fail)
    text = write_card(folder, TrimCardData(base_model="org/base"), measured=False).read_text()
    assert "licence and size could not be looked up" in text
    assert metadata_of(text)["base_model"] == "org/base" and metadata_of(text)["base_model_relation"] == "finetune"


def test_a_base_that_the_user_names_is_taken_and_a_path_refused(
    trained: tuple[TrimTrainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[1], folder, ignore=shutil.ignore_patterns(CARD, REPORT))
    monkeypatch.setattr("trimllm_hf.publish.card.describe_base", lambda base, revision: {"name": base, "local": True})
    path = write_card(folder, measured=False)
    assert "base_model" not in metadata_of(path.read_text())
    path.write_text(path.read_text().replace("library_name:", "base_model: org/by-hand\nlibrary_name:", 1))
    assert metadata_of(write_card(folder, measured=False).read_text())["base_model"] == "org/by-hand"
    with pytest.raises(ValueError, match="Expected base_model to be an id on the Hub, got '/home/me/base'"):
        TrimCardData(base_model="/home/me/base")


def test_a_base_that_the_trainer_is_told_is_taken_and_a_path_is_not(
    trained: tuple[TrimTrainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, named = trained[0], []
    monkeypatch.setattr(trainer, "card_data", replace(trainer.card_data))
    monkeypatch.setattr("trimllm_hf.training.card_mixin.write_card", lambda folder, data, **_: named.append(data.base_model))
    trainer.create_model_card(finetuned_from="/home/me/base")
    trainer.create_model_card(finetuned_from="org/base")
    assert named == [None, "org/base"]
