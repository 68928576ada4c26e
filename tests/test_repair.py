"""What a refit is: held against references by hand, on many architectures, and on stacks whose answer is known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from trimllm_hf.importance.evaluation import to_be_scored
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.drop import drop_layers
from trimllm_hf.surgery.repair import Repair, fit_repairs
from trimllm_hf.surgery.repair.fit import PENALTIES
from trimllm_hf.surgery.repair.normal_equations import weights_of
from trimllm_hf.surgery.repair.ridge import Sums, best_penalty, solve

logger = logging.get_logger("transformers.trimllm_hf")

Inputs = list[tuple[dict[str, Any], torch.Tensor]]


def inputs(rows: int = 24, length: int = 24, seed: int = 3) -> Inputs:
    ids = tokens(rows, length, seed)
    mask = torch.ones_like(ids)
    mask[:, -3:] = (torch.arange(rows) % 2)[:, None]  # padding at the end of every other row
    return [({"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8]}, mask[i : i + 8]) for i in range(0, rows, 8)]


def fitted(
    model: nn.Module, layers: list[int], batches: Any = None, unit: str = "block", penalty: float | None = 0.1
) -> Repair:
    with to_be_scored(model):
        (repair,) = fit_repairs(model, [layers], batches or inputs(), unit, penalty=penalty)
    return repair


def add(repair: Repair, model: nn.Module) -> None:
    with torch.no_grad():
        for parameter, change in repair.changes(model):
            parameter += change


def logits(model: Any) -> torch.Tensor:
    batch, _ = inputs(8, seed=9)[0]
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


def hidden(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def whole(weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return weights.double() if bias is None else torch.cat([weights.double(), bias.double()[None]])


def of_inputs(projection: Any) -> torch.Tensor:
    """Its weight, of shape (inputs, width)."""
    weight: torch.Tensor = projection.weight.detach()
    return weight if type(projection).__name__ == "Conv1D" else weight.T


@torch.no_grad()
def by_hand(
    model: Any, before: int, last: int, down: str, scale: float, norm: str | None = None, unchanged: Any = None
) -> torch.Tensor:
    """The new weight, and bias in a last row, in float64, by the equations of the whole target r = e - (h - s y).

    The target e is what block `last` of the unchanged model returns, by default of the model itself.
    """
    blocks, seen = find_blocks(model).blocks, []
    its_blocks = blocks if unchanged is None else find_blocks(unchanged).blocks
    projection = blocks[before].get_submodule(down)
    held: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        held[name] = value.double().clone()

    hooks = [
        projection.register_forward_hook(lambda _, args, output: (keep("a", args[0]), keep("y", output), None)[-1]),
    ]
    for name, block in (("h", blocks[before]), ("e", its_blocks[last])):
        if norm is None:
            hook = lambda _, args, output, name=name: keep(name, hidden(output))  # noqa: E731
            hooks.append(block.register_forward_hook(hook))
        else:
            hook = lambda _, args, name=name: keep(name, args[0])  # noqa: E731
            hooks.append(block.get_submodule(norm).register_forward_pre_hook(hook))
    for batch, mask in inputs():
        for each in (model, unchanged):
            if each is not None:
                each(**batch)
        seen.append((dict(held), mask.bool()))
    for hook in hooks:
        hook.remove()
    bias = projection.bias
    old = whole(of_inputs(projection), bias)
    gram, cross = torch.zeros(len(old), len(old)).double(), torch.zeros_like(old)
    for states, mask in seen:
        a, y = (states[name].reshape(*mask.shape, -1) for name in ("a", "y"))
        r = states["e"] - (states["h"] - scale * y)
        own = r + 0  # what the weight has to make, its bias too
        weights = torch.ones(mask.shape).double()
        for row in range(len(mask)):
            for norms in (a[row].norm(dim=-1), own[row].norm(dim=-1)):
                weights[row] = torch.minimum(weights[row], 3 * norms[mask[row]].median() / norms)
        a = a if bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        a, r = (a * weights[..., None])[mask], (r * weights[..., None])[mask] / scale
        gram, cross = gram + a.T @ a, cross + a.T @ r
    ridge = 0.1 * gram.diagonal().mean()
    return torch.linalg.solve(gram + ridge * torch.eye(len(old)), cross + ridge * old)


DOWN = {
    "llama": "mlp.down_proj",
    "mistral": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "qwen3": "mlp.down_proj",
    "phi3": "mlp.down_proj",
    "granite": "mlp.down_proj",  # multiplies what it adds
    "gpt2": "mlp.c_proj",  # transposed, with a bias
    "gpt_neox": "mlp.dense_4h_to_h",  # attention and MLP side by side
    "opt": "fc2",
    "phi": "mlp.fc2",
    "cohere": "mlp.down_proj",
}


@pytest.mark.parametrize("family", DOWN)
def test_a_reference_by_hand(family: str) -> None:
    scale = 0.22 if family == "granite" else 1.0
    model = tiny_model(family, **({"residual_multiplier": scale} if family == "granite" else {}))
    repair = fitted(model, [2, 3])
    (refit,) = repair.refits
    assert (refit.projection.name, refit.projection.norm) == (DOWN[family], None) and not repair.unrepaired
    assert refit.projection.scale == pytest.approx(scale, rel=1e-4)
    expected = by_hand(model, 1, 3, DOWN[family], scale)
    projection = find_blocks(model).blocks[1].get_submodule(DOWN[family])
    before = of_inputs(projection).clone()
    add(repair, model)
    new = of_inputs(projection)
    assert (before - new).abs().max() > 1e-3
    torch.testing.assert_close(whole(new, projection.bias), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_block_that_ends_with_a_norm(family: str) -> None:
    """The sum in front of the last dropped block's norm is the target, and that norm moves with it."""
    model = tiny_model(family) if family == "bert" else tiny_model(family, is_decoder=True)
    repair = fitted(model, [2, 3])
    (refit,) = repair.refits
    assert (refit.projection.name, refit.projection.norm) == ("output.dense", "output.LayerNorm")
    blocks = find_blocks(model).blocks
    with torch.no_grad():
        blocks[3].output.LayerNorm.weight.uniform_(0.5, 2)
        blocks[3].output.LayerNorm.bias.uniform_(-1, 1)
    repair = fitted(model, [2, 3])
    expected = by_hand(model, 1, 3, "output.dense", 1.0, "output.LayerNorm")
    with repair.previewed(model):
        tried = logits(model)
    add(repair, model)
    projection = blocks[1].output.dense
    torch.testing.assert_close(
        whole(of_inputs(projection), projection.bias), expected, rtol=0, atol=2e-4 * float(expected.abs().max())
    )
    torch.testing.assert_close(blocks[1].output.LayerNorm.weight, blocks[3].output.LayerNorm.weight)
    torch.testing.assert_close(blocks[1].output.LayerNorm.bias, blocks[3].output.LayerNorm.bias)
    drop_layers(model, [2, 3])
    torch.testing.assert_close(logits(model), tried, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_no_fold(family: str) -> None:
    """The MLP's result is normed, or weighted token by token, before it is added."""
    model = tiny_model(family)
    repair = fitted(model, [2, 3])
    assert not repair.refits and ["adds straight" in why for why in repair.unrepaired.values()] == [True]


class Follows(nn.Module):
    """Adds a linear map of what another block's down projection got: linear in its input's MLP features."""

    def __init__(self, of: Any, seed: int) -> None:
        super().__init__()
        self.of = [of]  # not a child
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(of.mlp.down_proj.weight.shape, generator=generator))
        of.mlp.down_proj.register_forward_pre_hook(lambda _, args: setattr(self, "features", args[0]))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states + self.features @ self.matrix.T


def test_exact_where_the_dropped_block_is_linear_in_the_features() -> None:
    model = tiny_model()
    blocks = model.model.layers
    blocks[2].forward = Follows(blocks[1], 1).forward
    blocks[3].forward = Follows(blocks[1], 2).forward
    full = logits(model)
    repair = fitted(model, [2, 3], penalty=1e-9)
    with repair.previewed(model, refitted=False):
        assert (logits(model) - full).abs().max() > 1
    with repair.previewed(model):
        torch.testing.assert_close(logits(model), full, rtol=1e-4, atol=1e-3)
    add(repair, model)
    del blocks[2].forward, blocks[3].forward
    drop_layers(model, [2, 3])
    torch.testing.assert_close(logits(model), full, rtol=1e-4, atol=1e-3)


def test_an_infinite_penalty_is_the_plain_drop_bit_by_bit() -> None:
    model, plain = tiny_model(), tiny_model()
    repair = fitted(model, [2, 4], penalty=float("inf"))
    add(repair, model)
    drop_layers(model, [2, 4])
    drop_layers(plain, [2, 4])
    assert torch.equal(logits(model), logits(plain))
    # and a large one is near it
    near = fitted(tiny_model(), [2, 4], penalty=1e9)
    assert all(change.abs().max() < 1e-6 for refit in near.refits for change in refit.changes.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "opt", "bert"])
def test_tried_is_what_comes_of_it(family: str, tmp_path: Path) -> None:
    """Tried on the whole model, written and dropped, saved and loaded by stock transformers: the same logits."""
    model = tiny_model(family)
    untouched = copy.deepcopy(model.state_dict())
    repair = fitted(model, [1, 3, 4])
    assert len(repair.refits) == 2
    with repair.previewed(model):
        tried = logits(model)
    with repair.previewed(model, refitted=False):
        plain = logits(model)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    other = tiny_model(family)
    drop_layers(other, [1, 3, 4])
    assert torch.equal(logits(other), plain)
    add(repair, model)
    drop_layers(model, [1, 3, 4])
    repaired = logits(model)
    torch.testing.assert_close(repaired, tried, rtol=1e-3, atol=1e-4)
    assert (repaired - plain).abs().max() > 1e-2
    if family != "bert":
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), repaired)


def test_candidates_in_one_pass_are_as_each_alone() -> None:
    model = tiny_model()
    with to_be_scored(model):
        several = fit_repairs(model, [[2, 3], [1, 2, 3], [2, 3, 5]], inputs(), penalty=0.1)
    for repair in several:
        alone = fitted(model, list(repair.layers))
        assert [refit.gap for refit in repair.refits] == [refit.gap for refit in alone.refits]
        for one, other in zip(repair.refits, alone.refits, strict=True):
            torch.testing.assert_close(one.changes["mlp.down_proj.weight"], other.changes["mlp.down_proj.weight"])


def test_the_first_layer_has_nothing_in_front_of_it() -> None:
    repair = fitted(tiny_model(), [0, 1, 3])
    assert [str(refit.gap) for refit in repair.refits] == ["layer 3"]
    assert {str(gap): why for gap, why in repair.unrepaired.items()} == {"layers 0 to 1": "no layer stays in front of it"}


def test_few_tokens_take_the_form_of_a_matrix() -> None:
    """Weight and bias are multiplied by one matrix of the width, anchored at the identity; fewer still change nothing."""
    model = tiny_model("opt")  # width 32, MLP 64
    (refit,) = fitted(model, [2], inputs(8)).refits
    projection = find_blocks(model).blocks[1].fc2
    old = whole(of_inputs(projection), projection.bias)
    changed = whole(refit.changes["fc2.weight"].T, refit.changes["fc2.bias"])
    matrix = torch.linalg.lstsq(old, changed).solution
    torch.testing.assert_close(old @ matrix, changed, rtol=0, atol=1e-4 * float(changed.abs().max()))
    (full,) = fitted(model, [2]).refits
    changed = whole(full.changes["fc2.weight"].T, full.changes["fc2.bias"])
    assert (old @ torch.linalg.lstsq(old, changed).solution - changed).abs().max() > 1e-2 * changed.abs().max()
    nothing = fitted(model, [2], inputs(8, 8))
    assert not nothing.refits and "128 calibration tokens at least, there are 52" in "".join(nothing.unrepaired.values())


def test_the_equations_are_in_full_precision_under_autocast() -> None:
    """A caller's autocast is for the forward pass, as where Accelerate wraps that alone; in both forms of a refit."""
    model, wrapped = tiny_model("opt"), tiny_model("opt")
    wrapped.forward = torch.autocast("cpu", torch.bfloat16)(wrapped.forward)
    for rows in (24, 8):
        (expected,) = fitted(wrapped, [2, 3], inputs(rows)).refits
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = fitted(model, [2, 3], inputs(rows)).refits
        for name, change in expected.changes.items():
            assert torch.equal(found.changes[name], change)
        assert expected.changes["fc2.weight"].abs().max() > 1e-3


def test_equations_without_a_solution_leave_that_gap_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    block = model.model.layers[3]
    broken = block.register_forward_hook(lambda _, args, output: output * float("nan"))
    logger.addHandler(caplog.handler)
    try:
        repair = fitted(model, [1, 3])
    finally:
        logger.removeHandler(caplog.handler)
        broken.remove()
    assert [str(refit.gap) for refit in repair.refits] == ["layer 1"]
    assert {str(gap): why for gap, why in repair.unrepaired.items()} == {
        "layer 3": "its equations have no solution in numbers"
    }


def test_padding_counts_for_nothing() -> None:
    model = tiny_model()
    repair = fitted(model, [2])
    other = inputs()
    for batch, mask in other:
        batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, 5)
    assert any(
        (one["input_ids"] != another["input_ids"]).any() for (one, _), (another, _) in zip(inputs(), other, strict=True)
    )
    again = fitted(model, [2], other)
    for one, another in zip(repair.refits, again.refits, strict=True):
        torch.testing.assert_close(one.changes["mlp.down_proj.weight"], another.changes["mlp.down_proj.weight"])


def test_weights_of_tokens() -> None:
    features = torch.ones(2, 16)
    targets = torch.ones(2, 16)
    features[0, 0], targets[1, 5] = 500, 30
    real = torch.ones(2, 16, dtype=torch.bool)
    weights = weights_of(features, targets, real)
    assert weights[0, 0] == pytest.approx(3 / 500) and weights[1, 5] == pytest.approx(0.1)
    assert (weights.flatten().sort().values[2:] == 1).all()


@pytest.mark.parametrize("layers", [[4, 5], [5], [2, 9]])
def test_sublayers(layers: list[int]) -> None:
    """A half's own linear map takes over what the halves behind it add, between the halves of a block too."""
    model = tiny_model()
    repair = fitted(model, layers, unit="sublayer")
    assert len(repair.refits) == len(layers) - (layers == [4, 5]) and not repair.unrepaired
    with repair.previewed(model):
        tried = logits(model)
    full = logits(model)
    with repair.previewed(model, refitted=False):
        plain = logits(model)
    assert (tried - full).norm() < (plain - full).norm()
    add(repair, model)
    drop_layers(model, layers, unit="sublayer")
    torch.testing.assert_close(logits(model), tried, rtol=1e-3, atol=1e-4)


def test_a_dropped_mlp_is_taken_over_by_its_own_attention() -> None:
    (refit,) = fitted(tiny_model(), [5], unit="sublayer").refits
    assert (refit.position, refit.projection.name) == (2, "self_attn.o_proj")


def test_the_penalty_that_does_best_on_other_tokens() -> None:
    """Of noise it is the greatest, of what is linear in the features the least; the fit then takes all tokens."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(400, 40, generator=generator).double(), torch.randn(40, 8, generator=generator).double()
    noise = torch.randn(400, 8, generator=generator).double()

    def sums(target: torch.Tensor, rows: slice) -> Sums:
        return Sums(features[rows].T @ features[rows], features[rows].T @ target[rows])

    ours, others, penalties = slice(0, 50), slice(50, 400), (0.1, 0.01, 1.0, 10.0)
    assert best_penalty(sums(noise, ours), sums(noise, others), penalties) == 10.0
    assert best_penalty(sums(features @ weight, ours), sums(features @ weight, others), penalties) == 0.01
    errors = {}
    for penalty in penalties:
        change = solve(sums(noise, ours), penalty)
        errors[penalty] = float((features[others] @ change - noise[others]).square().sum())
    assert min(errors, key=lambda penalty: errors[penalty]) == 10.0


def test_by_default_the_penalty_is_chosen() -> None:
    model = tiny_model()
    chosen = fitted(model, [2, 3], penalty=None).refits[0].changes["mlp.down_proj.weight"]
    with_each = [fitted(model, [2, 3], penalty=each).refits[0].changes["mlp.down_proj.weight"] for each in PENALTIES]
    assert sum(torch.equal(chosen, each) or torch.allclose(chosen, each, atol=1e-5) for each in with_each) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_later_gap_is_fitted_on_the_model_repaired_so_far(family: str) -> None:
    """It aims at the hidden states of the unchanged model, from those of the model without the layers in front."""
    model, cut = tiny_model(family), tiny_model(family)
    name, norm = ("output.dense", "output.LayerNorm") if family == "bert" else (DOWN[family], None)
    first = fitted(model, [1])
    add(first, cut)
    drop_layers(cut, [1])  # block 3 is its block 2 now
    expected = by_hand(cut, 2, 4, name, 1.0, norm, unchanged=model)
    _, refit = fitted(model, [1, 4]).refits
    projection = find_blocks(model).blocks[3].get_submodule(name)
    bias = refit.changes.get(f"{name}.bias")
    change = refit.changes[f"{name}.weight"]
    new = of_inputs(projection) + (change if type(projection).__name__ == "Conv1D" else change.T)
    found = whole(new, None if bias is None else projection.bias.detach() + bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4 * float(expected.abs().max()))
    (alone,) = fitted(model, [4]).refits
    assert (alone.changes[f"{name}.weight"] - change).abs().max() > 1e-2 * change.abs().max()


def test_quantized_weights_are_no_place_for_it() -> None:
    class Packed(nn.Linear):
        """As bitsandbytes holds them: a linear map by its class, whose weight is bytes."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.held = [linear]
            self.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.held[0](features)

    model = tiny_model()
    for block in model.model.layers:
        block.mlp.down_proj = Packed(block.mlp.down_proj)
    repair = fitted(model, [2, 3])
    assert not repair.refits and "no linear map" in "".join(repair.unrepaired.values())
