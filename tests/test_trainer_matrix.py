"""Ways to use a Trainer, each run twice: with TrimCallback, and with the same layers skipped by hand at the same steps.

A skipped layer is in the model, without gradients and without effect; a dropped one is gone. All else has to be equal: the
losses, the learning rates, and the weights that stay. And each of TRL's Trainers with each kind of score: trained, or
refused in words before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config
from trainer_rows import ROLLOUTS, ROWS, TRL, Skip, logged

from trimllm_hf import LayerMap, TrimCallback

pytestmark = pytest.mark.slow


def skip_without_trl(row: str) -> None:
    if row in {*TRL, *ROLLOUTS, "GKD"}:
        pytest.importorskip("trl", reason="TRL is not installed")


@pytest.mark.parametrize("row", ROWS)
def test_a_run_equals_one_that_skips_the_same_layers(row: str, tmp_path: Path) -> None:
    skip_without_trl(row)
    make = ROWS[row]
    trimmed = make(tmp_path / "trimmed", [TrimCallback(config(importance="random", drop_every="2"))])
    trimmed.train()
    layer_map = LayerMap.from_config(trimmed.model.config)
    assert layer_map.num_layers == 4 and [record.step for record in layer_map.history] == [2, 4]
    by_hand = make(tmp_path / "hand", [Skip(layer_map.history)])
    by_hand.train()
    assert len(logged(trimmed, "loss")) == 8
    for name in ("loss", "learning_rate", "eval_loss"):
        assert logged(trimmed, name) == pytest.approx(logged(by_hand, name), abs=1e-6), name
    kept = {f"model.layers.{i}.": f"model.layers.{layer}." for i, layer in enumerate(layer_map.kept_layers)}
    expected = by_hand.model.state_dict()
    for name, value in trimmed.model.state_dict().items():
        number = next((old for old in kept if name.startswith(old)), "")
        torch.testing.assert_close(value, expected[kept.get(number, "") + name.removeprefix(number)], rtol=0, atol=1e-6)


def outcome(row: str, folder: Path, **trim: Any) -> str:
    """How deep the model is after a run, or why that was refused; then nothing has changed."""
    skip_without_trl(row)
    trainer = ROWS[row](folder, [TrimCallback(config(drop_every="2", **trim))])
    try:
        trainer.train()
    except ValueError as error:
        assert str(error).startswith("Expected ") and trainer.state.global_step == 0
        assert len(trainer.model.model.layers) == 6
        return str(error)
    return str(len(trainer.model.model.layers))


@pytest.mark.parametrize("importance", ["block_influence", "sensitivity", "taylor"])
@pytest.mark.parametrize("row", [*TRL, "GKD"])
def test_every_score_of_a_loss_over_examples(row: str, importance: str, tmp_path: Path) -> None:
    assert outcome(row, tmp_path, importance=importance) == "4"


@pytest.mark.parametrize("row", ROLLOUTS)
def test_of_rollouts_only_what_prompts_tell(row: str, tmp_path: Path) -> None:
    assert outcome(row, tmp_path / "prompts", importance="block_influence") == "4"
    assert "generates what it trains on" in outcome(row, tmp_path / "loss", importance="sensitivity")
