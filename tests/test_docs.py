"""The Python of README.md and of docs/ runs, page by page from top to bottom, on a tiny model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tiny_texts
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, TrimTrainer, trim_like

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
    tiny_model(num_hidden_layers=8, max_position_embeddings=256).save_pretrained(tmp_path / "org/base")
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


Given = dict[str, Any]


def nothing(given: Given) -> None:
    """The reader's own names are enough."""


class StopAfter(TrainerCallback):
    """Ends a run after so many steps, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def interrupted(given: Given) -> None:
    """A run that has saved a checkpoint while it was losing layers."""
    given["args"].save_strategy, given["args"].save_steps = "steps", 10
    trim = TrimConfig(target_ratio=0.5)
    trainer = TrimTrainer(
        tiny_model(num_hidden_layers=8), given["args"], train_dataset=given["data"], trim=trim, callbacks=[StopAfter(10)]
    )
    trainer.train()
    assert 4 < depth(trainer.model) < 8  # its last checkpoint is of a depth between


def adapter(given: Given) -> None:
    """A LoRA adapter that was trained while its base lost layers."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base = AutoModelForCausalLM.from_pretrained("org/base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trim = TrimCallback(TrimConfig(target_layers=5))
    trainer = Trainer(model, given["args"], train_dataset=given["data"], callbacks=[trim])
    trainer.train()
    trainer.save_model("my-adapter")
    given.update(AutoModelForCausalLM=AutoModelForCausalLM, PeftModel=peft.PeftModel, trim_like=trim_like)


def loop(given: Given) -> None:
    """What a hand-written Accelerate loop has at hand."""
    model, given["accelerator"] = tiny_model(), Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    given["prepared"], given["optimizer"] = given["accelerator"].prepare(model, optimizer)


def depth(model: Any) -> int:
    return len(LayerMap.from_config(model.config).kept_layers)


def publishing(given: Given) -> None:
    """The names that the README's earlier blocks have imported."""
    given.update(TrimConfig=TrimConfig, TrimTrainer=TrimTrainer)


def has_a_card(given: Given) -> bool:
    return "0.712" in (Path(given["args"].output_dir) / "README.md").read_text()


README: list[tuple[str, int, Callable[[Given], None], Callable[[Given], bool]]] = [
    ("quick start", 32, nothing, lambda given: depth(AutoModelForCausalLM.from_pretrained("my-model")) == 16),
    ("TrimTrainer", 8, interrupted, lambda given: depth(given["model"]) == 4 and given["trainer"].state.global_step == 80),
    ("stop rules", 8, publishing, lambda given: True),  # that its settings go together
    ("adapters", 8, adapter, lambda given: depth(given["model"]) == 5),
    ("outside a Trainer", 8, loop, lambda given: depth(given["model"]) == 6 and depth(given["prepared"]) == 5),
    ("publish", 32, publishing, has_a_card),
]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, id=name, marks=[pytest.mark.slow] * (name in ("adapters", "publish")))
        for n, (name, *_) in enumerate(README)
    ],
)
def test_a_block_of_the_readme_runs(number: int, folder: Path) -> None:
    _, layers, prepare, holds = README[number]
    given = names(layers)
    prepare(given)
    exec(compile(blocks_of("README.md")[number], f"README.md, block {number}", "exec"), given)
    assert holds(given)


def test_every_block_of_the_readme_is_run() -> None:
    assert len(blocks_of("README.md")) == len(README)
