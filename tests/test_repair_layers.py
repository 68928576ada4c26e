"""`repair_layers`: when it changes a model, when it does not, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_encoder_decoder import seq2seq
from tiny import tiny_model, tokens
from torch import nn

from trimllm_hf import drop_layers, drop_prepared_layers, repair_layers
from trimllm_hf.importance.evaluation import to_be_scored
from trimllm_hf.surgery.repair import Repair, fit_repairs
from trimllm_hf.training.repair import evaluate_repair, fit, loss_without

DROPPED = [2, 3]


def batches(count: int = 10, rows: int = 4, length: int = 24, seed: int = 3) -> list[dict[str, Any]]:
    ids = tokens(rows * count, length, seed)
    return [{"input_ids": part, "labels": part} for part in ids.split(rows)]


def taught(model: Any, seed: int = 5) -> list[dict[str, Any]]:
    """Batches that a model predicts well: it is asked for what it says."""
    found = batches(seed=seed)
    with torch.no_grad():
        for batch in found:
            said = model(input_ids=batch["input_ids"], use_cache=False).logits.argmax(dim=-1)
            batch["labels"] = torch.cat([batch["input_ids"][:, :1], said[:, :-1]], dim=1)
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_repair_that_helps_is_applied() -> None:
    model, data = tiny_model(), taught(tiny_model())
    fit_on, held_out = data[:-2], data[-2:]
    before = state(model)
    report = repair_layers(model, DROPPED, fit_on, held_out=held_out)
    assert report.applied and report.repaired == ("layers 2 to 3",) and not report.unrepaired
    assert report.repaired_loss < report.plain_loss
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    drop_layers(model, DROPPED)
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss for batch in held_out]
    assert sum(losses) / 2 == pytest.approx(report.repaired_loss, rel=1e-4)
    assert str(report).startswith("Repaired for layers 2 to 3: held-out loss ")


def test_a_repair_that_harms_is_not() -> None:
    """The plain drop's own answers are the labels: nothing can be better than it."""
    model, plain = tiny_model(), tiny_model()
    drop_layers(plain, DROPPED)
    data = taught(plain)
    before = state(model)
    report = repair_layers(model, DROPPED, data)
    assert not report.applied and report.repaired_loss > report.plain_loss
    assert unchanged(model, before) and str(report).startswith("The plain drop stays: held-out loss ")


class Outlier:
    """A model in which a feature of the first token is 500 times as large as the others' features, as of attention sinks."""

    def __init__(self) -> None:
        self.model: Any = tiny_model()
        self.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(self.plant)

    def plant(self, _: nn.Module, args: Any) -> Any:
        (features,) = args
        features = features.clone()
        median = features[:, 1:].norm(dim=-1).median()
        features[:, 0, 7] = 500 * median
        return (features,)

    def fitted(self, leave_out: bool) -> Repair:
        data = []
        for batch in batches(24):
            mask = torch.ones_like(batch["input_ids"])
            mask[:, 0] = not leave_out
            data.append(({"input_ids": batch["input_ids"]}, mask))
        with to_be_scored(self.model):
            (repair,) = fit_repairs(self.model, [DROPPED], data)
        return repair

    @torch.no_grad()
    def misfit(self, repair: Repair, refitted: bool) -> tuple[float, float]:
        """How far the states behind the gap are from the whole model's: the first token's, and all others' median."""
        states: list[torch.Tensor] = []
        hook = self.model.model.layers[3].register_forward_hook(lambda _, args, output: states.append(output))
        ids = batches(8, seed=9)[0]["input_ids"]
        self.model(ids, use_cache=False)
        with repair.previewed(self.model, refitted):
            self.model(ids, use_cache=False)
        hook.remove()
        far = (states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
        return float(far[:, 0].mean()), float(far[:, 1:].median())


def test_tokens_of_massive_activation_go_where_they_went() -> None:
    planted = Outlier()
    repair, left_out = planted.fitted(leave_out=False), planted.fitted(leave_out=True)
    _, plain_others = planted.misfit(repair, refitted=False)
    first, others = planted.misfit(repair, refitted=True)
    assert first < 0.1
    assert others < 0.9 * plain_others
    thrown, _ = planted.misfit(left_out, refitted=True)
    assert thrown > 1  # left out of the fit, they would go anywhere


def test_without_labels_states_are_compared() -> None:
    model = tiny_model("bert")
    data = [{"input_ids": batch["input_ids"]} for batch in batches(16)]
    report = repair_layers(model, DROPPED, data)
    assert report.applied and 0 < report.repaired_loss < report.plain_loss < 2


def test_a_causal_model_needs_no_labels() -> None:
    model, data = tiny_model(), batches()
    (repair,) = fit(model, [DROPPED], data)
    without = [{"input_ids": batch["input_ids"]} for batch in data]
    assert loss_without(model, repair, without) == pytest.approx(loss_without(model, repair, data))


@pytest.mark.parametrize(("family", "part"), [("t5", "decoder"), ("bart", "decoder"), ("bart", "encoder")])
def test_a_part_of_an_encoder_decoder(family: str, part: str) -> None:
    model: Any = seq2seq(family)
    ids = tokens(64, 24)
    data = [{"input_ids": part, "labels": part[:, :20].contiguous()} for part in ids.split(8)]
    (repair,) = fit(model, [[1, 3]], data, part=part)
    assert len(repair.refits) == 2
    tried = loss_without(model, repair, data)
    with torch.no_grad():
        for parameter, change in repair.changes(model):
            parameter += change
    drop_layers(model, [1, 3], part=part)
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in data]
    assert sum(losses) / len(losses) == pytest.approx(tried, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "layers", "count", "match"),
    [
        ("gemma2", DROPPED, 10, "no linear map of Gemma2DecoderLayer adds straight to the hidden states"),
        ("llama", DROPPED, 2, "it takes 128 calibration tokens at least, there are 96"),
        ("llama", [0], 10, "layer 0: no layer stays in front of it"),
        ("llama", DROPPED, 1, "Expected at least two batches"),
        ("llama", [9], 10, "Expected"),
    ],
)
def test_refusals(family: str, layers: list[int], count: int, match: str) -> None:
    model = tiny_model(family)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        repair_layers(model, layers, batches(count))
    assert unchanged(model, before)


def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Expected a model without adapters to repair"):
        repair_layers(model, DROPPED, batches())


def test_nothing_of_training_is_disturbed() -> None:
    model = tiny_model().train()
    model.config.use_cache = True
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    (repair,) = fit(model, [DROPPED], batches())
    evaluate_repair(model, repair, batches(2, seed=8))
    assert model.training and all(module.training for module in model.modules()) and model.config.use_cache
    assert torch.equal(torch.rand(2), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_in_a_hand_written_loop_it_is_the_same() -> None:
    data = taught(tiny_model())
    one, other = tiny_model(), tiny_model()
    report = repair_layers(one, DROPPED, data)
    drop_layers(one, DROPPED)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(other, torch.optim.AdamW(other.parameters()))
    layer_map = drop_prepared_layers(accelerator, model, optimizer, DROPPED, step=1, repair=data)
    assert report.applied and layer_map.kept_layers == (0, 1, 4, 5)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    with pytest.raises(ValueError, match="Expected at least two batches"):
        drop_prepared_layers(accelerator, model, optimizer, [1], repair=data[:1])
    assert len(other.model.layers) == 4
