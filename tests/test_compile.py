"""torch.compile: after a drop the graphs are made anew, and training goes on as if nothing had been compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM, Trainer

from trimllm_hf import TrimCallback, drop_layers, score_layers


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(folder: Path, model: Any, **changes: Any) -> Trainer:
    settings = arguments(folder, max_steps=8, **changes)
    trainer = Trainer(model, settings, train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(tmp_path_factory.mktemp("plain"), tiny_model())


@pytest.mark.parametrize("how", [pytest.param("arguments", marks=pytest.mark.slow), "in place"])
def test_a_compiled_run_equals_one_that_is_not(how: str, plain: Trainer, tmp_path: Path) -> None:
    model: Any = tiny_model()
    changes: dict[str, Any] = {}
    counter = CompileCounter()
    if how == "arguments":
        changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    else:
        model.compile(backend=counter)
    trainer = train(tmp_path, model, **changes)
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-6)  # traced, attention gets a mask, not a flag
    assert how == "arguments" or counter.frame_count >= 3  # once for each depth
    trainer.save_model(str(tmp_path / "final"))
    final = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    expected = plain.model.state_dict()
    assert final.config.num_hidden_layers == 4
    assert all((value - expected[name]).abs().mean() < 1e-6 for name, value in final.state_dict().items())


@pytest.mark.slow
def test_drops_do_not_use_up_the_number_of_recompilations(tmp_path: Path) -> None:
    """torch compiles a function again only some times; then it would run it uncompiled, and say so in a log."""
    counter = CompileCounter()
    model = tiny_model(num_hidden_layers=8)
    model.compile(backend=counter)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 2
    try:
        settings = arguments(tmp_path, max_steps=8)
        trim = config(target_layers=3, drop_every="1", importance="last")
        Trainer(model, settings, train_dataset=tiny_texts(), callbacks=[TrimCallback(trim)]).train()
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert counter.frame_count >= 6  # one for each depth


def test_what_is_compiled_stays_compiled_after_a_refusal() -> None:
    ids = torch.randint(3, 50, (2, 4))
    with pytest.raises(ValueError, match="Expected part"):
        score_layers(tiny_model(), [{"input_ids": ids, "labels": ids}], part="nonsense")
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1


def test_a_wrapper_is_refused(tmp_path: Path) -> None:
    model = torch.compile(tiny_model(), backend="eager")
    with pytest.raises(ValueError, match=r"TrainingArguments\(torch_compile=True\), or in place .*got torch.compile"):
        Trainer(model, arguments(tmp_path), train_dataset=tiny_texts(), callbacks=[TrimCallback(config())])


def test_a_compiled_model_loses_layers_by_hand() -> None:
    model = torch.compile(tiny_model(), backend="eager")
    ids = torch.arange(5, 15)[None]
    before = model(ids).logits
    drop_layers(model, [2])
    other = tiny_model()
    drop_layers(other, [2])
    assert torch.equal(model(ids).logits, other(ids).logits) and not torch.equal(before, other(ids).logits)
