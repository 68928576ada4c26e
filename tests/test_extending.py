"""CONTRIBUTING's table of what to touch: each addition is made here in the places it names, and works everywhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainingArguments

from trimllm_hf import LayerMap, TrimCallback, TrimCardData, TrimConfig, register_importance, score_layers, write_card
from trimllm_hf.engines import Engine, SingleProcess, attach
from trimllm_hf.engines.attach import ENGINES
from trimllm_hf.engines.local import LocalEngine
from trimllm_hf.importance import scores as registry
from trimllm_hf.layer_map import UNITS
from trimllm_hf.publish import card
from trimllm_hf.training import run as training_run

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"^\| (an? .*?) \| (.*?) \| `(\w+)` \|$", re.M)


def train(folder: Path, **settings: Any) -> Trainer:
    trim = TrimCallback(
        TrimConfig(**{"target_layers": 4, "drop_every": "2", "calibration_size": 8, "repair": "none", **settings})
    )
    arguments = TrainingArguments(
        str(folder), max_steps=8, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0
    )
    trainer = Trainer(tiny_model(), arguments, train_dataset=tiny_texts(24, length=8), callbacks=[trim])
    trainer.train()
    return trainer


def test_a_new_score_is_known_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in the registry: in `score_layers`, in a config, as tie-breaker, in a run and in its history."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_importance("middle", lambda model, batches, unit: (torch.tensor([9.0, 1.0, 5.0, 0.0, 5.0, 9.0]), 1.0))
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert score_layers(tiny_model(), [batch], importance="middle").argmin() == 3
    assert TrimConfig(target_layers=4, tie_breaker="middle").tie_breaker == "middle"
    trainer = train(tmp_path, target_layers=5, importance="middle", warm_up_importance="none")
    (drop,) = LayerMap.from_config(trainer.model.config).history
    assert drop.dropped == (3,) and drop.importance == "middle"


class OnlyTheContract(SingleProcess, Engine):
    """An engine of which a run sees what `engine.py` says, and nothing else."""

    made: ClassVar[list[OnlyTheContract]] = []

    def __init__(self, model: Any, optimizer: Any, accelerator: Any = None) -> None:
        self.inner, self.edits = LocalEngine(model, optimizer, accelerator), 0
        self.made.append(self)

    def edit(self, edit: Any, removed_parameters: Any) -> Any:
        self.edits += 1
        return self.inner.edit(edit, removed_parameters)

    def add(self, changes: Any) -> None:
        self.inner.add(changes)

    @classmethod
    def unprepared(cls, accelerator: Any, model: Any) -> Any:
        return LocalEngine.unprepared(accelerator, model)


def test_a_new_engine_is_one_class_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with it drops the same layers, and leaves the same weights, as with the engine that it stands before."""
    torch.manual_seed(0)
    without = train(tmp_path / "without")
    kind = without.accelerator.distributed_type
    monkeypatch.setitem(ENGINES, kind, OnlyTheContract)
    assert isinstance(attach(without.accelerator, without.model, without.optimizer), OnlyTheContract)
    OnlyTheContract.made.clear()
    torch.manual_seed(0)
    trainer = train(tmp_path / "with")
    assert sum(engine.edits for engine in OnlyTheContract.made) == 2
    assert LayerMap.from_config(trainer.model.config) == LayerMap.from_config(without.model.config)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, without.model.get_parameter(name)), name


def names_of_units(file: Path) -> Iterator[int]:
    """Lines that compare something with a unit other than the default one."""
    others = set(UNITS) - {"block"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare | ast.MatchValue):
            found = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            if others & {value for value in found if isinstance(value, str)}:
                yield node.lineno


def test_a_new_unit_is_known_to_the_map_and_the_surgery_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is like "sublayer" but for its name: a run by it scores, drops and logs the same."""
    monkeypatch.setitem(UNITS, "half", UNITS["sublayer"])
    settings: dict[str, Any] = {"target_layers": 11, "importance": "block_influence"}
    trainers = []
    for unit in ("sublayer", "half"):
        torch.manual_seed(0)
        trainers.append(train(tmp_path / unit, unit=unit, **settings))
    known, new = trainers
    assert LayerMap.from_config(new.model.config) == LayerMap.from_config(known.model.config)
    assert LayerMap.from_config(new.model.config).num_units("half") == 11
    for name, parameter in new.model.named_parameters():
        assert torch.equal(parameter, known.model.get_parameter(name)), name
    logged = [[{k: v for k, v in row.items() if k.startswith("trim/")} for row in t.state.log_history] for t in trainers]
    assert logged[0] == logged[1] and any(logged[0])
    scores = [
        score_layers(new.model, [{"input_ids": torch.arange(3, 9)[None]}], "last", unit) for unit in ("sublayer", "half")
    ]
    assert torch.equal(*scores)


def test_only_the_map_and_the_surgery_know_a_unit_by_name() -> None:
    """All else takes the units of a model from `list_units`, and their number from the map."""
    outside = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / "trimllm_hf").rglob("*.py"))
        if file.relative_to(ROOT / "trimllm_hf").parts[0] not in ("layer_map", "surgery")
        for line in names_of_units(file)
    ]
    assert not outside
    assert list(names_of_units(ROOT / "trimllm_hf/layer_map/layer_map.py"))  # else the test sees nothing


class ClosesAfter:
    """A stop rule: no layer goes after a step."""

    def __init__(self, *args: Any) -> None:
        self.steps: list[int] = []

    def is_open(self, step: int) -> bool:
        self.steps.append(step)
        return step <= 2

    def plan_step(self, step: int) -> int:
        return step

    def must_evaluate(self, step: int, due: int) -> bool:
        return False

    def allows(self, step: int) -> bool:
        return True

    def dropped(self, step: int) -> None: ...

    def passed_instead(self, step: int) -> None:
        return None

    def tidy(self) -> None: ...


def test_a_new_stop_rule_is_asked_before_each_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "MetricRule", ClosesAfter)
    trainer = train(tmp_path, importance="last", max_metric_drop=0.1)
    assert len(LayerMap.from_config(trainer.model.config).kept_layers) == 5  # of two drops, the one after step 2
    assert len(LayerMap.from_config(train(tmp_path / "other", importance="last").model.config).kept_layers) == 4


def test_a_new_section_of_the_card_is_written_kept_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template has it, and the marks around it do the rest: text by hand stays, the section is written anew."""
    template = tmp_path / "card.md.jinja"
    added = '{% call section("carbon") %}\n## Carbon\n\n{{ data.domain }}\n{% endcall %}\n'
    template.write_text(card.TEMPLATE.read_text(encoding="utf-8") + added, encoding="utf-8")
    monkeypatch.setattr(card, "TEMPLATE", template)
    trainer = train(tmp_path / "run", importance="last")
    folder = tmp_path / "model"
    trainer.model.save_pretrained(folder)
    path = write_card(folder, TrimCardData(domain="first domain"), measured=False)
    text = path.read_text(encoding="utf-8")
    assert "## Carbon\n\nfirst domain" in text
    path.write_text(text.replace("## Carbon", "By hand: before\n## Carbon") + "\nBy hand: after\n", encoding="utf-8")
    write_card(folder, TrimCardData(domain="second domain"), measured=False)
    text = path.read_text(encoding="utf-8")
    assert "## Carbon\n\nsecond domain" in text and "By hand: after" in text
    assert "first domain" not in text and "By hand: before" not in text  # within the marks


def test_the_table_names_files_that_are_there_and_these_tests() -> None:
    rows = TABLE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [added for added, _, _ in rows] == ["a score", "an engine", "a unit", "a stop rule", "a section of the card"]
    for added, files, test in rows:
        named = re.findall(r"`([\w/.]+)`", files)
        assert 1 <= len(named) <= 2, added
        assert all((ROOT / "trimllm_hf" / name).exists() for name in named), added
        assert callable(globals().get(test)), test
