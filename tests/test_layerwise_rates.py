"""Layer-wise learning rates, a group of parameters for each layer: through drops, a save and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, SequentialLR
from transformers import Trainer, TrainerCallback

from trimllm_hf import TrimCallback, TrimTrainer, trim_like
from trimllm_hf.engines import attach
from trimllm_hf.engines.attach import ENGINES
from trimllm_hf.engines.local import LocalEngine
from trimllm_hf.engines.parameter_groups import remove_from_optimizer


def layerwise(model: Any) -> list[dict[str, Any]]:
    """A group a layer: the deeper, the faster; and one for the rest."""
    blocks = model.model.layers
    groups = [{"params": list(block.parameters()), "lr": 1e-3 * 0.7 ** (5 - i)} for i, block in enumerate(blocks)]
    inside = {id(parameter) for parameter in blocks.parameters()}
    return [*groups, {"params": [p for p in model.parameters() if id(p) not in inside], "lr": 1e-4}]


class OwnOptimizer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(layerwise(self.model), lr=1e-3)
        return self.optimizer


class OwnTrimOptimizer(TrimTrainer, OwnOptimizer):
    pass


def given(model: Any) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(layerwise(model), lr=1e-3)
    return {"optimizers": (optimizer, LambdaLR(optimizer, lambda step: 1 - step / 10))}


WAYS: dict[str, Any] = {
    "optimizers": given,
    "optimizer_cls_and_kwargs": lambda model: {
        "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": layerwise(model), "lr": 1e-3})
    },
    "create_optimizer": lambda model: {},
}


class Rates(TrainerCallback):
    """The learning rate of each group, after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        assert all(group["params"] for group in optimizer.param_groups)
        self.seen[state.global_step] = [group["lr"] for group in optimizer.param_groups]


def train(folder: Path, way: str, trims: bool, resume: Path | None = None) -> tuple[Trainer, Rates]:
    model, rates, trim = tiny_model(), Rates(), config(importance="random", drop_every="2")
    kinds: list[Any] = [OwnOptimizer, OwnTrimOptimizer] if way == "create_optimizer" else [Trainer, TrimTrainer]
    if resume is not None and not trims:
        trim_like(model, resume)
    how: dict[str, Any] = {"trim": trim} if trims else {}
    trainer = kinds[trims](
        model, arguments(folder, max_steps=8, save_strategy="steps", save_steps=3), train_dataset=tiny_texts(60),
        callbacks=[] if trims else [TrimCallback(trim)], **how, **WAYS[way](model),
    )  # fmt: skip
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, rates


SLOW = pytest.mark.slow


@pytest.mark.parametrize("trims", [False, pytest.param(True, marks=SLOW)], ids=["Trainer", "TrimTrainer"])
@pytest.mark.parametrize("way", ["optimizers", *(pytest.param(way, marks=SLOW) for way in list(WAYS)[1:])])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(way: str, trims: bool, tmp_path: Path) -> None:
    whole, rates = train(tmp_path / "whole", way, trims)
    assert [len(rates.seen[step]) for step in range(1, 9)] == [7, 6, 6, 5, 5, 5, 5, 5]
    kept = whole.model.config.trim["kept_layers"]
    factors = [*(0.7 ** (5 - layer) for layer in kept), 0.1]  # each layer keeps its own
    assert rates.seen[5] == pytest.approx([rates.seen[5][-1] * 10 * factor for factor in factors])
    assert rates.seen[5][-1] < rates.seen[1][-1]
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed, again = train(tmp_path / "resumed", way, trims, checkpoint)
    assert again.seen == {step: rates.seen[step] for step in range(4, 9)} and losses(resumed) == losses(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_no_group_may_become_empty_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fills(LocalEngine):
        def groups_to_fill(self) -> list[list[torch.nn.Parameter]]:
            return [group["params"] for group in self.optimizer.param_groups]

    monkeypatch.setitem(ENGINES, DistributedType.NO, Fills)
    model = tiny_model()
    callbacks, data = [TrimCallback(config(importance="last", drop_every="2"))], tiny_texts(60)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=callbacks, **given(model))
    with pytest.raises(ValueError, match=r"got the group 0 with only the layers \['0'\].*another engine"):
        trainer.train()
    assert trainer.state.global_step == 0 and len(model.model.layers) == 6


# ---- a scheduler's own lists


def one_cycle(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, max_lr=[0.1, 0.2, 0.3], total_steps=9)


def in_sequence(optimizer: Any) -> Any:
    parts = [LambdaLR(optimizer, [lambda step, k=k: 1 / (k + step + 1) for k in range(3)]) for _ in range(2)]
    return SequentialLR(optimizer, parts, milestones=[3])


@pytest.mark.parametrize("make", [one_cycle, in_sequence])
def test_a_scheduler_forgets_what_it_keeps_for_a_group(make: Any) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]

    def made(some: list[Any], rates: list[float]) -> Any:
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(some, rates, strict=True)]
        return torch.optim.AdamW(groups)

    optimizer, whole = made(parameters, [0.1, 0.2, 0.3]), made(parameters, [0.1, 0.2, 0.3])
    scheduler, reference = make(optimizer), make(whole)
    for step in range(7):
        for each, plan in ((optimizer, scheduler), (whole, reference)):
            each.step()
            plan.step()
        if step == 1:
            remove_from_optimizer(optimizer, parameters[1:2], [scheduler])
        rates = [group["lr"] for group in whole.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == (rates if step < 1 else rates[::2])
        assert scheduler.get_last_lr() == (rates if step < 1 else rates[::2])


class OfItsOwn(LambdaLR):
    """A user's: it keeps something for each group under a name that is not torch's."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.floors = [0.0 for _ in optimizer.param_groups]


@pytest.mark.parametrize("schedulers", ["none known", "one of its own"])
def test_an_emptied_group_stays_where_a_scheduler_could_not_follow(schedulers: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)
    scheduler = OfItsOwn(optimizer)
    remove_from_optimizer(optimizer, parameters[1:2], None if schedulers == "none known" else [scheduler])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0, 1]
    optimizer.step()
    scheduler.step()


def test_a_loops_prepared_scheduler_is_known() -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), tiny_model()
    optimizer = torch.optim.SGD(layerwise(model), lr=0.1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, LambdaLR(optimizer, lambda step: 1.0))
    assert attach(accelerator, model, optimizer).schedulers == [scheduler]
    assert attach(accelerator, model, accelerator.prepare(torch.optim.SGD(model.parameters()))).schedulers is None
