"""The Python of README.md and of docs/ runs, page by page from top to bottom, on a tiny model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/how-it-works.md", "docs/choosing-a-score.md")


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def names(layers: int) -> dict[str, Any]:
    """What a page takes as given: the reader's model, arguments, data and batches."""
    data = tiny_texts(160, length=8)
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    settings: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return {
        "model": tiny_model(num_hidden_layers=layers),
        "args": TrainingArguments("out", max_steps=80, per_device_train_batch_size=16, **settings),
        "data": data,
        "batches": [batch, batch],
        "Trainer": Trainer,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is run; its base lies there under the name that the pages give it."""
    monkeypatch.chdir(tmp_path)
    tiny_model(num_hidden_layers=8).save_pretrained(tmp_path / "org/base")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, folder: Path) -> None:
    given = names(8)
    blocks = blocks_of(page)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), given)


def test_every_page_with_code_is_run() -> None:
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if blocks_of(f"docs/{page.name}")} == set(PAGES)


def test_the_quick_start_runs(folder: Path) -> None:
    """The first block of README.md; what it saves has the depth that it says."""
    given = names(32)
    exec(compile(blocks_of("README.md")[0], "README.md", "exec"), given)
    assert len(AutoModelForCausalLM.from_pretrained("my-model").model.layers) == 16
