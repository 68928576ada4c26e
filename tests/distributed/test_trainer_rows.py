"""The most used ways to use a Trainer, under engines: as in one process that skips the same layers by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from trainer_rows import MOST_USED, ROWS, Skip, logged

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("engine", ["plain", pytest.param("zero2", marks=pytest.mark.deepspeed)])
def test_two_processes_equal_one_that_skips_the_layers(engine: str, torchrun, tmp_path: Path) -> None:
    torchrun("rows.py", str(tmp_path), engine, timeout=600)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    if engine == "zero2":
        for said, step, depth in (first["emptied"], second["emptied"]):
            assert "every parameter group of the optimizer to keep a parameter" in said and (step, depth) == (0, 6)
    for number, row in enumerate(MOST_USED):
        found = first[row]
        assert found["type"] == {"plain": "MULTI_CPU", "zero2": "DEEPSPEED"}[engine]
        assert found["history"] == second[row]["history"] and [step for step, _ in found["history"]] == [2, 4]
        history = [SimpleNamespace(step=step, dropped=dropped) for step, dropped in found["history"]]
        by_hand = ROWS[row](tmp_path / "hand" / str(number), [Skip(history)])
        by_hand.train()
        for name in ("loss", "learning_rate", "eval_loss"):
            assert found[name] == pytest.approx(logged(by_hand, name), abs=1e-5), (row, name)
        gone = {layer for _, dropped in found["history"] for layer in dropped}
        stay = [layer for layer in range(6) if layer not in gone]
        expected = by_hand.model.state_dict()
        for name, value in torch.load(tmp_path / f"{number}.pt").items():
            words = name.split(".")
            if "layers" in words:
                at = words.index("layers") + 1
                words[at] = str(stay[int(words[at])])
            torch.testing.assert_close(value, expected[".".join(words)], rtol=0, atol=1e-5)
