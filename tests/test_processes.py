"""What processes tell one another: errors, the layers that go; and what outlives new gradient buckets."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_training import arguments, config
from tiny import tiny_model, tiny_texts
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from trimllm_hf import LayerMap, TrimCallback, register_importance
from trimllm_hf.engines import DistributedProcesses, SingleProcess
from trimllm_hf.engines.ddp import DDPEngine
from trimllm_hf.importance.calibration import set_aside
from trimllm_hf.training.prepared_loop import refuse_other_layers
from trimllm_hf.utils import isolated_rng


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Unsendable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock", threading.Lock())


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (KeyError("no such column"), KeyError, "no such column"),
        (Unsendable(), RuntimeError, "Process 0 failed: Unsendable: .*holds a lock"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError, "CUDA out of memory. Tried"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), RuntimeError, "invalid start byte"),
    ],
)
def test_an_error_is_told_as_text(error: Exception, kind: type[Exception], said: str, group: None) -> None:
    processes, told = DistributedProcesses(), []
    whole = processes._exchange
    processes._exchange = lambda mine: told.append(mine) or whole(mine)  # type: ignore[method-assign]
    processes.raise_on_all(error)
    processes._exchange = lambda mine: told  # type: ignore[method-assign]  # what the other process is given
    with pytest.raises(kind, match=said) as raised:
        processes.gather(1)
    assert type(raised.value) is kind
    processes._exchange = lambda mine: pytest.fail("it would be told twice")  # type: ignore[method-assign]
    processes.raise_on_all(raised.value)


def test_other_layers_on_another_process_are_refused() -> None:
    class Two(SingleProcess):
        rank, world_size = 0, 2

        def gather(self, value: Any) -> list[Any]:
            return [value, ([1, 3], "block")]

    refuse_other_layers(Two(), [3, 1], "block")
    with pytest.raises(ValueError, match=r"same layers on every process, got process 0: \[2\] .*process 1: \[1, 3\]"):
        refuse_other_layers(Two(), [2], "block")


def test_hooks_on_the_wrapper_outlive_its_new_buckets(group: None) -> None:
    model = tiny_model()
    wrapper, calls = DistributedDataParallel(model), []
    wrapper.register_forward_pre_hook(lambda module, args, kwargs: calls.append(("pre", sorted(kwargs))), with_kwargs=True)
    wrapper.register_forward_hook(lambda module, args, kwargs, out: calls.append(("post", sorted(kwargs))), with_kwargs=True)
    wrapper.register_forward_hook(lambda *_: calls.append(("always",)), always_call=True)
    wrapper.register_load_state_dict_pre_hook(lambda *_: calls.append(("load",)))
    wrapper.register_load_state_dict_post_hook(lambda *_: calls.append(("loaded",)))
    wrapper.register_state_dict_pre_hook(lambda *_: calls.append(("state",)))
    engine = DDPEngine(wrapper, torch.optim.SGD(model.parameters()))
    gone = list(model.model.layers[2].parameters())
    engine.edit(lambda: model.model.layers.__delitem__(2), lambda: gone)
    wrapper(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        wrapper(no_such_input=1)
    wrapper.load_state_dict(wrapper.state_dict())
    names = ["pre", "post", "always", "pre", "always", "state", "load", "loaded"]
    assert [call[0] for call in calls] == names and calls[0][1] == calls[1][1] == ["input_ids"]


def test_examples_that_were_set_aside_never_come_back_from_a_shuffled_stream() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(40)]})
    stream = rows.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=8)
    examples, rest = set_aside(stream, 5, seed=0)
    held = {tuple(example["input_ids"]) for example in examples}
    for epoch in range(4):
        rest.set_epoch(epoch)
        seen = [tuple(example["input_ids"]) for example in rest]
        assert len(seen) == 35 and not held & set(seen)
    assert rest.column_names == stream.column_names


def test_random_state_of_other_devices_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that this machine lacks, as torch would show them."""
    states = {0: torch.tensor([1]), 1: torch.tensor([2]), "mps": torch.tensor([3])}
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.xpu, "set_rng_state", lambda state, device: states.update({device: state}))
    monkeypatch.setattr(torch.xpu, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.update(mps=state))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: None)
    with isolated_rng(0):
        states.update({0: torch.tensor([9]), 1: torch.tensor([9]), "mps": torch.tensor([9])})
    assert {name: state.item() for name, state in states.items()} == {0: 1, 1: 2, "mps": 3}


def test_a_scan_takes_the_batch_size_that_fits(tmp_path: Path) -> None:
    sizes: list[int] = []

    def hungry(model: Any, batches: Any, unit: str) -> Any:
        sizes.append(len(batches[0]["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.arange(float(len(model.model.layers))), 1.0

    register_importance("hungry", hungry)
    model, args = tiny_model(), arguments(tmp_path, max_steps=6, auto_find_batch_size=True)
    trim = TrimCallback(config(importance="hungry", drop_every="once"))
    Trainer(model, args, train_dataset=tiny_texts(40), callbacks=[trim]).train()
    assert model.config.num_hidden_layers == 4 and sizes[0] == 4 and sizes[-1] <= 2


def test_a_subclass_of_the_callback_keeps_its_map_in_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    class Mine(TrimCallback):
        """A user's own, with a name of its own."""

    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=6)
    callback = Mine(config(importance="last", drop_every="2"))
    Trainer(tiny_model(), args, train_dataset=tiny_texts(40), callbacks=[callback]).train()
    (tmp_path / "checkpoint-6" / "config.json").unlink()  # as in a sharded one
    found = LayerMap.from_checkpoint(tmp_path / "checkpoint-6")
    assert found is not None and callback.layer_map is not None and found.keeps_the_same(callback.layer_map)
