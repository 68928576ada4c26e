"""Several layers chosen with few passes: as a greedy scan does where that is promised, with fewer models measured."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from importance_models import make_batches, make_model

from trimllm_hf import drop_layers, score_layers
from trimllm_hf.importance import evaluate_metric
from trimllm_hf.importance.lazy import PassedOver, greedy_layers, lazy_greedy
from trimllm_hf.surgery.units import behind_hidden, block_output

PLACES = (0.0, 1.0, 2.0, 3.5, 5.0, 5.5, 7.0, 9.0, 9.5, 12.0, 12.7, 14.0, 16.1, 16.4, 18.2, 19.0, 21.5, 22.0)
INNER = list(range(1, len(PLACES) - 1))


def stretched(gone: Collection[int]) -> float:
    """A cost that grows the faster, the more is gone: the squares of the gaps between what is left on a line."""
    left = [place for number, place in enumerate(PLACES) if number not in gone]
    return sum((after - before) ** 2 for before, after in pairwise(left))


def greedily(cost: Any, candidates: Collection[int], count: int) -> list[int]:
    gone: list[int] = []
    for _ in range(count):
        gone.append(min((c for c in candidates if c not in gone), key=lambda c: cost((*gone, c))))
    return gone


def test_lazily_is_greedily_where_costs_grow() -> None:
    for count in range(1, len(INNER)):
        found = lazy_greedy(stretched, INNER, count, width=len(INNER))
        assert list(found.layers) == greedily(stretched, INNER, count)
        assert found.cost == pytest.approx(stretched(found.layers))
    # beyond the whole model and the first look at each, after which a greedy scan has more rounds
    assert found.evaluations - 1 - len(INNER) < sum(range(2, len(INNER))) / 2


def test_what_gets_cheaper_as_others_go_is_seen() -> None:
    """Without layer 3 the costs of 1 and 2 change places; a step measures the two that were cheapest before."""

    def cost(gone: Collection[int]) -> float:
        of_each = {1: 2.0, 2: 0.5, 3: 1.0, 4: 9.0} if 3 in gone else {1: 2.0, 2: 2.1, 3: 1.0, 4: 9.0}
        return sum(of_each[layer] for layer in gone)

    assert lazy_greedy(cost, [1, 2, 3, 4], 2, width=4).layers == (3, 2)


def test_a_scan_spares_the_first_look_at_each() -> None:
    of_each = {candidate: stretched((candidate,)) for candidate in INNER}
    found = lazy_greedy(stretched, INNER, 1, width=len(INNER), of_each=of_each)
    assert found.evaluations == 1 and list(found.layers) == greedily(stretched, INNER, 1)


def test_the_filter_looks_at_so_many() -> None:
    asked: list[tuple[int, ...]] = []

    def cost(gone: Collection[int]) -> float:
        asked.append(tuple(gone))
        return float(sum(gone))

    order = [8, 5, 7, 1]
    assert lazy_greedy(cost, order, 2, width=2).layers == (5, 7)  # 1 is not looked at, though it would be cheapest
    assert [gone for gone in asked if len(gone) == 1] == [(8,), (5,)]
    assert lazy_greedy(cost, order, 4, width=1).layers == tuple(order)


@pytest.mark.parametrize(("count", "width"), [(0, 1), (5, 1), (2, 0)])
def test_what_cannot_be_chosen_is_refused(count: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} and width={width}"):
        lazy_greedy(stretched, [1, 2, 3, 4], count, width=width)


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "OpenAIGPTLMHeadModel", "MptForCausalLM", "BertForSequenceClassification"]
)
def test_passing_over_is_dropping(name: str) -> None:
    model = make_model(name)
    batches = make_batches(model)
    passed = PassedOver(model)
    with passed.without([1, 3]):
        losses = [evaluate_metric(model, batches) for _ in range(2)]
    before = evaluate_metric(model, batches)
    drop_layers(model, [1, 3])
    assert losses == pytest.approx([evaluate_metric(model, batches)] * 2, rel=1e-6)
    assert abs(before - losses[0]) > 1e-4  # it was given back


def test_sets_that_cannot_be_dropped_are_not_tried() -> None:
    """Without some of Gemma 4's layers others find no keys to read, and a pass would end in an error."""
    model = make_model("LlamaForCausalLM", num_hidden_layers=6)
    asked: list[list[int]] = []

    def allowed(layers: Sequence[int]) -> bool:
        asked.append(list(layers))
        return not {2, 3} <= {*layers}

    found = greedy_layers(model, make_batches(model), 3, allowed=allowed)
    assert not {2, 3} <= {*found.layers} and any({2, 3} <= {*layers} for layers in asked)


@pytest.mark.parametrize("output", [namedtuple("Output", "one other")(1, 2), {"one": 1, "other": 2}])
def test_an_output_of_another_form_is_refused(output: Any) -> None:
    for read in (block_output, behind_hidden):
        with pytest.raises(ValueError, match=r"with one, other\. Trim such a model by a score that runs nothing"):
            read(output)


def test_blocks_that_are_passed_over_do_no_work() -> None:
    model = make_model("LlamaForCausalLM")
    batches, calls = make_batches(model), list[int]()
    for position, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *args, position=position: calls.append(position))
    passed = PassedOver(model)
    with passed.without([2]):
        evaluate_metric(model, batches)
        calls.clear()
        evaluate_metric(model, batches)
    assert set(calls) == {0, 1, 3, 4}


@pytest.mark.parametrize("width", [None, 2])
def test_the_cost_is_that_of_the_model_without_them(width: int | None) -> None:
    model = make_model("LlamaForCausalLM", num_hidden_layers=6)
    batches = make_batches(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = "sensitivity" if width is None else "block_influence"
    likeliest = score_layers(model, batches, first)[1:-1].argsort() + 1
    found = greedy_layers(model, batches, 3, width=width)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model.model.layers) == 6
    assert found.layers[0] in likeliest[: width or 1].tolist()
    drop_layers(model, sorted(found.layers))
    assert found.cost == pytest.approx(evaluate_metric(model, batches), rel=1e-6)
