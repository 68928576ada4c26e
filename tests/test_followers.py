"""What else holds a model's layers is found before the first step; and a drop's values join the Trainer's own records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments, config, losses
from tiny import tiny_model, tiny_texts
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback

from trimllm_hf import TrimCallback
from trimllm_hf.training.followers import refuse_followers
from trimllm_hf.training.trainer_batches import without_trace


def train(folder: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    trim = TrimCallback(config(**{"drop_every": "2", "importance": "last", **changes}))
    given = {"train_dataset": tiny_texts(40), "callbacks": [trim, *callbacks]}
    trainer = kind(tiny_model(), arguments(folder, max_steps=6), **given)
    trainer.train()
    return trainer


class Holds(TrainerCallback):
    """Makes what it holds of the model when training begins, or is given it before."""

    def __init__(self, make: Any, early: bool = False) -> None:
        self.make, self.held = make, make(tiny_model()) if early else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.held = self.make(model)


class Shadow:
    """An average of weights as diffusers' EMAModel and torch_ema's are."""

    def __init__(self, model: Any) -> None:
        self.shadow_params = [parameter.detach().clone() for parameter in model.parameters()]


FOLLOWERS = {
    "a model kept in step": (lambda model: copy.deepcopy(model), "another model with as many layers"),
    "torch's average": (lambda model: AveragedModel(model), "another model with as many layers"),
    "a list of averages": (Shadow, "a tensor of the shape of each"),
    "averages by name": (
        lambda model: {n: p.detach().clone() for n, p in model.named_parameters()},
        "tensors by the names of",
    ),
    "the parameters": (lambda model: list(model.parameters()), "a (parameter of a layer|tensor of the shape)"),
    "another optimizer": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), "a (parameter|tensor of the shape)"),
    "a layer": (lambda model: {"watched": model.model.layers[3]}, "a layer"),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_would_not_follow_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    make, said = FOLLOWERS[name]
    holder = Holds(make)
    with pytest.raises(ValueError, match=rf"got Holds.held, which holds {said}.*it would not follow"):
        train(tmp_path, holder)


def test_a_copy_that_is_there_before_is_found_before_a_drop_at_the_start(tmp_path: Path) -> None:
    holder = Holds(copy.deepcopy, early=True)
    with pytest.raises(ValueError, match=r"got Holds\.held, which holds another model"):
        train(tmp_path, holder, drop_every="once")


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model,
        lambda model: model.model,
        lambda model: model.get_input_embeddings(),
        lambda model: [len(model.model.layers)],
        lambda model: {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        lambda model: torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(6)),
    ],
    ids=["the model", "the backbone", "embeddings", "numbers", "shapes", "another list"],
)
def test_what_follows_or_holds_none_is_left_alone(make: Any, tmp_path: Path) -> None:
    trainer = train(tmp_path, Holds(make))
    assert trainer.model.config.num_hidden_layers == 4


def test_a_frozen_reference_that_a_trainer_holds_may_be_deeper(tmp_path: Path) -> None:
    class WithReference(Trainer):
        ref_model = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ref_model = copy.deepcopy(self.model).eval()

    assert train(tmp_path, kind=WithReference).model.config.num_hidden_layers == 4


def test_an_average_on_the_trainer_is_refused(tmp_path: Path) -> None:
    class Averaging(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.average = Shadow(self.model)

    with pytest.raises(ValueError, match=r"got Averaging\.average"):
        train(tmp_path, kind=Averaging)


def test_trl_callbacks_that_follow_a_model_are_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.callbacks import SyncRefModelCallback

    with pytest.raises(ValueError, match=r"got SyncRefModelCallback\.ref_model"):
        train(tmp_path, SyncRefModelCallback(tiny_model(), None))
    with pytest.raises(ValueError, match="got BEMACallback"):
        train(tmp_path, trl.BEMACallback(update_freq=1, update_after=0))


# ---- engines that generate


class Engine:
    """As TRL's `VLLMGeneration`: it has the policy at hand, and takes its weights by name to a model of its own."""

    def __init__(self, model: Any, copied: Any) -> None:
        self.model, self.llm = model, copied

    def sync_weights(self) -> None:
        own = dict(self.llm.named_parameters())
        for name, parameter in self.model.named_parameters():
            own[name].data.copy_(parameter)


class Server:
    """One that streams to another process: it holds no copy."""

    def __init__(self, model: Any) -> None:
        self.policy = model

    def update_named_params(self) -> None: ...


class Worker:
    """One that is given the weights: it holds the copy alone, out of sight of the policy."""

    def __init__(self, copied: Any) -> None:
        self.runner = {"model": copied}

    def update_weights_from_tensor(self, tensors: Any) -> None: ...


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: Engine(model, copy.deepcopy(model)), "weights Engine.sync_weights takes to an engine"),
        (lambda model: Server(model), "weights Server.update_named_params takes to an engine"),
        (lambda model: [Server(model.model)], "weights Server.update_named_params takes to an engine"),
        (lambda model: Worker(copy.deepcopy(model)), "another model with as many layers"),
    ],
    ids=["colocated", "a server", "in a list", "a copy alone"],
)
def test_an_engine_that_is_sent_the_weights_is_refused(make: Any, said: str, tmp_path: Path) -> None:
    class Generating(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.generation = make(self.model)

    with pytest.raises(ValueError, match=rf"got Generating\.generation, which holds .*{said}"):
        train(tmp_path, kind=Generating)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_trls_own_engine_is_refused(mode: str, tmp_path: Path) -> None:
    module = pytest.importorskip("trl.generation.vllm_generation", reason="this TRL has no such module")

    class Generating(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.vllm_generation = object.__new__(module.VLLMGeneration)  # without starting vLLM
            vars(self.vllm_generation).update(model=self.model, mode=mode, accelerator=self.accelerator)

    with pytest.raises(
        ValueError, match=r"got Generating\.vllm_generation, .* VLLMGeneration\.sync_weights takes to an engine"
    ):
        train(tmp_path, kind=Generating)


def test_the_argument_that_starts_one_is_refused(tmp_path: Path) -> None:
    class Generating(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args.use_vllm = True

    with pytest.raises(ValueError, match="use_vllm=False"):
        train(tmp_path, kind=Generating)


def test_what_sends_something_else_is_left_alone(tmp_path: Path) -> None:
    class Logger:
        def __init__(self) -> None:
            self.weights = {"loss": torch.ones(2)}

        def update_weights(self) -> None: ...

    class Logging(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.balance = Logger()

    assert train(tmp_path, kind=Logging).model.config.num_hidden_layers == 4


# ---- records


def test_what_a_subclass_accumulates_stays_in_the_records_of_the_steps(tmp_path: Path) -> None:
    class Accumulating(Trainer):
        """As TRL's trainers do: metrics of each step, added to the next record and forgotten."""

        seen = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.seen += self.model.training
            return super().compute_loss(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "batches": self.seen}, *args, **kwargs)
            self.seen = 0

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.told: list[dict[str, float]] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.told.append(dict(logs))

    reporter = Reporter()
    trainer = train(tmp_path, reporter, kind=Accumulating)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["batches"] for entry in steps] == [2] * 6 and len(losses(trainer)) == 6
    assert {entry["step"]: entry["trim/num_layers"] for entry in steps if "trim/num_layers" in entry} == {2: 5, 4: 4}
    assert len(trainer.state.log_history) == 7  # and the one at the end: none of our own
    assert [entry["trim/num_layers"] for entry in reporter.told if "trim/num_layers" in entry] == [5, 4]


def test_drops_before_the_first_step_join_its_record(tmp_path: Path) -> None:
    trainer = train(tmp_path, drop_every="once")
    first, *others = trainer.state.log_history
    assert first["step"] == 1 and first["trim/num_layers"] == 4 and "loss" in first
    assert not any("trim/num_layers" in entry for entry in others)


class Example(dict):
    """One of many that a list holds: whoever goes through them all, does so for minutes."""

    def copy(self) -> Any:
        raise AssertionError("An example was copied.")

    items = values = copy


def test_nobody_goes_through_examples_in_a_list(tmp_path: Path) -> None:
    data = [Example(text) for text in tiny_texts(4)]
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=data, eval_dataset={"one": data})
    refuse_followers(trainer, trainer.model, None)
    with without_trace(trainer):
        pass
    assert trainer.train_dataset is data and len(data) == 4
