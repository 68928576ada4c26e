"""The recipes in two processes, as `ddp.yaml` and `zero2.yaml` launch them: one table, one model, one card."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed")
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_base import save_base, save_texts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENGINES = [("plain", "MULTI_CPU"), pytest.param("zero2", "DEEPSPEED", marks=pytest.mark.deepspeed)]


@pytest.mark.parametrize("name", ["finance", "legal", "medical", "classification"])
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_a_recipe_on_two_processes(name: str, engine: str, kind: str, torchrun: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train, valid = (save_texts(tmp_path / f"{seed}.jsonl", 120, seed) for seed in (0, 1))
    depth = ["--depths", "2"] if name == "classification" else ["--target_layers", "2", "--calibration_size", "9"]
    output = torchrun(
        *("recipe.py", name, "--engine", engine, "--output_dir", str(out), "--disable_tqdm", "true", *depth),
        *("--model_name_or_path", save_base(tmp_path / "base"), "--max_length", "32", "--drop_overlap"),
        *("--train_file", train, "--validation_file", valid, "--max_eval_samples", "59", "--max_steps", "60"),
        *("--learning_rate", "3e-3", "--per_device_train_batch_size", "8", "--save_strategy", "no", "--report_to", "none"),
    )
    assert output.count(f"{engine}: {kind} on 2 processes") == 2
    assert output.count("| accuracy ") == 1
    trimmed = json.loads((out / "results.json").read_text())[-1]
    assert trimmed["layers"] == 2 and trimmed["questions"] == 59  # each process scored its share
    assert trimmed["accuracy"] - 3 * trimmed["standard_error"] > 1 / 3
    folder = out / "2-of-6" if name == "classification" else out
    assert (folder / "README.md").is_file()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
