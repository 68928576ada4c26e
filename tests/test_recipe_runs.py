"""Whole runs of the recipes for law, finance and classification: their demos, and real data on a real small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed")

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(620)]


def run(name: str, folder: Path, *flags: str, timeout: float = 600) -> tuple[str, list[dict[str, Any]]]:
    """What a recipe prints, and its table."""
    command = [sys.executable, str(RECIPES / f"{name}.py"), "--output_dir", str(folder), "--disable_tqdm", "true", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["legal", "finance"])
def test_a_demo(name: str, tmp_path: Path) -> None:
    """Both fine-tuned models are far above the chance of 0.25, the trimmed one has half of the layers, and a card."""
    output, table = run(name, tmp_path, "--demo")
    rows = {row["model"]: row for row in table}
    trimmed, full = rows["trimmed and fine-tuned"], rows["full depth, fine-tuned"]
    assert (trimmed["layers"], full["layers"]) == (6, 12)
    assert trimmed["accuracy"] - 4 * trimmed["standard_error"] > 0.25 < full["accuracy"] - 4 * full["standard_error"]
    assert trimmed["exact_match"] > rows["base, before fine-tuning"]["exact_match"]
    assert "<- chosen" in output and "exact match" in output
    card = (tmp_path / "README.md").read_text()
    assert "invented" in card and f"{trimmed['accuracy']:.3f}"[1:4] in card


def test_the_classification_demo(tmp_path: Path) -> None:
    output, table = run("classification", tmp_path, "--demo")
    assert [row["layers"] for row in table] == [12, 8, 4, 2, 1]
    best = max(table, key=lambda row: row["accuracy"])
    assert best["accuracy"] - 3 * best["standard_error"] > 1 / 6  # of eight organs, the commonest
    assert "| k " in output and "the shallowest: k = " in output


SMALL = """--max_length 256 --max_train_samples 600 --max_eval_samples 30 --max_steps 30 --per_device_train_batch_size 4
    --learning_rate 1e-3 --save_strategy no --calibration_size 16""".split()


@pytest.mark.parametrize(
    ("name", "data", "flags"),
    [
        ("legal", "cuad_clauses", ("--max_choices", "6", "--drop_overlap")),
        ("finance", "twitter_financial_news", ("--drop_overlap",)),
        ("medical", "pubmedqa", ()),
    ],
)
def test_real_data_with_a_real_small_model(
    shared: Path, name: str, data: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """The table has its columns, off-domain accuracy too, and the trimmed model is what its config says."""
    files = {split: shared / "data" / data / f"{split}.jsonl" for split in ("train", "valid", "test")}
    given = [("--train_file", files["train"]), ("--validation_file", files["valid"]), ("--test_file", files["test"])]
    outside = [
        str(shared / "data" / "mmlu_domain" / "test" / f"{subject}_test.csv") for subject in ("virology", "econometrics")
    ]
    _, table = run(
        name,
        tmp_path,
        *("--model_name_or_path", str(shared / "models" / "stories260K"), "--target_layers", "3", *SMALL, *flags),
        *(str(word) for flag, file in given if file.is_file() for word in (flag, file)),
        *("--off_domain_file", *outside),
    )
    base, trimmed = table
    assert (base["layers"], trimmed["layers"]) == (5, 3)
    assert trimmed["questions"] == trimmed["off_domain_questions"] == 30
    assert ("exact_match" in trimmed) == (name != "legal")  # a clause type is longer than what counts as a short answer
    assert trimmed["parameters"] < base["parameters"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["trim"]["base_num_layers"] == 5
    card = (tmp_path / "README.md").read_text()
    assert f"{data}/" in card and "virology_test.csv" in card


def test_sliced_in_place_of_trimmed(tmp_path: Path) -> None:
    output, table = run("medical", tmp_path, "--demo", "--slice_ratio", "0.25", "--max_steps", "30")
    rows = {row["model"]: row for row in table}
    sliced, base = rows["sliced and fine-tuned"], rows["base, before fine-tuning"]
    assert sliced["layers"] == base["layers"] == 12 and sliced["parameters"] < base["parameters"]
    assert "sliced and fine-tuned" in output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "trimllm_sliced" and len(config["slicing"]["per_layer_config"]) == 12
    assert "The layers are narrower" in (tmp_path / "README.md").read_text()


def test_classification_of_real_texts(shared: Path, tmp_path: Path) -> None:
    """k against accuracy, and a card of the model that is published: the first k blocks of a real small model."""
    data = shared / "data" / "twitter_financial_news"
    _, table = run(
        "classification",
        tmp_path,
        *("--model_name_or_path", str(shared / "models" / "stories260K"), "--depths", "5", "2", "--publish_depth", "2"),
        *("--train_file", str(data / "train.jsonl"), "--test_file", str(data / "valid.jsonl"), "--drop_overlap"),
        *SMALL[:-2],  # it takes no calibration set
    )
    assert [row["layers"] for row in table] == [5, 2] and {row["questions"] for row in table} == {30}
    config = json.loads((tmp_path / "2-of-5" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["trim"]["kept_layers"] == [0, 1]
    card = (tmp_path / "2-of-5" / "README.md").read_text()
    assert "██░░░" in card and f"{table[1]['accuracy']:.3f}"[1:4] in card and f"{table[0]['accuracy']:.3f}"[1:4] in card
