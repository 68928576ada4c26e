"""Each score on a stack that is worked out by hand, and on a real small model against plain hidden states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importance_models import make_batches, make_model
from toy import ToyForCausalLM, toy_model

from trimllm_hf import TrimConfig, score_layers
from trimllm_hf.importance import from_compute_metrics, known
from trimllm_hf.importance.gradient import weights_times_gradients
from trimllm_hf.importance.order import choose, choose_window

TURN, IDENTITY, DOUBLE, COPY = range(4)
# Two rows; the second is shorter, and its padding is a token like any other.
IDS = torch.tensor([[0, 2, 0, 2], [1, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}

# Every vector has length 1 until the doubling, then 2. A turn is at a right angle to its input.
BY_HAND = {
    "block_influence": [1, 0, 0, 1],
    "layer_redundancy": [0, -1, -1, 0],
    "activation_norm": [-1, -1, -2, -2],
    "relative_magnitude": [math.sqrt(2), 0, 1 / 2, math.sqrt(2)],
    "angular": [0.5, 0, 0, 0.5],
    "last": [4, 3, 2, 1],
    "deepest_except_last": [4, 3, 2, 5],
    "first": [0, 1, 2, 3],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    scores = score_layers(toy_model(), [BATCH], name)
    torch.testing.assert_close(scores, torch.tensor(BY_HAND[name], dtype=torch.float64), rtol=1e-6, atol=1e-4)


def by_hand_loss(length: float, right: float) -> float:
    """-log softmax where the right token's logit is `right` times the length and the others are -1, 0, 0 or 1, 0, 0."""
    return math.log(math.exp(length) + math.exp(-length) + 2) - right * length


def test_scan_by_hand() -> None:
    # Each next token is opposite to the one before. Two turns and the doubling make -2x: it points at the next token.
    # Without a turn the vector is at a right angle to it; without the doubling it is as before, but of length 1.
    expected = [by_hand_loss(2, 0), by_hand_loss(2, 1), by_hand_loss(1, 1), by_hand_loss(2, 0)]
    scores = score_layers(toy_model(), [BATCH])
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert scores.argsort(stable=True).tolist()[:2] == [IDENTITY, DOUBLE]
    torch.testing.assert_close(score_layers(toy_model(), [BATCH], "perplexity"), scores.exp(), rtol=1e-6, atol=1e-6)


def test_taylor_by_hand() -> None:
    # The loss is of the product of all weights w: w dL/dw is the same for each, 2 dL/da at length a = 2.
    slope = 2 * ((math.exp(2) - math.exp(-2)) / (math.exp(2) + math.exp(-2) + 2) - 1)
    model = toy_model()
    model.layers[COPY].weight.grad = torch.tensor(7.0)
    scores = score_layers(model, [BATCH], "taylor")
    torch.testing.assert_close(scores, abs(slope) * torch.ones(4, dtype=torch.float64))
    assert model.layers[COPY].weight.grad == 7 and model.layers[TURN].weight.grad is None


def test_a_layer_without_a_gradient_has_no_score() -> None:
    model = toy_model()
    model.layers[IDENTITY].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got none of the layers \[1\]"):
        score_layers(model, [BATCH], "taylor")
    model.layers[COPY].weight.grad = torch.tensor(7.0)
    assert torch.isnan(weights_times_gradients(model, "block", 1)).tolist() == [True, True, True, False]


class Hasty(ToyForCausalLM):
    """Leaves its last block out while it is not trained, as an early exit does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        had, self.layers = self.layers, self.layers if self.training else self.layers[:-1]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = had


@pytest.mark.parametrize("name", ["sensitivity", "block_influence", "angular"])
def test_a_layer_that_does_not_run_has_no_score(name: str) -> None:
    model = Hasty(toy_model().config)
    with pytest.raises(ValueError, match=r"got one without the layers \[3\]"):
        score_layers(model, [BATCH], name)
    assert len(model.layers) == 4


def test_angular_of_windows_by_hand() -> None:
    # turn+identity, identity+doubling, doubling+turn: a right angle, none, a right angle; three: a right angle each
    for window, expected in {2: [0.5, 0, 0.5], 3: [0.5, 0.5], 4: [1]}.items():
        scores = score_layers(toy_model(), [BATCH], "angular", window=window)
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-3)
    chosen = choose_window(score_layers(toy_model(), [BATCH], "angular", window=2), 2, 1, 1)
    assert chosen.positions == [IDENTITY, DOUBLE] and chosen.margin is None


def test_every_score_that_there_is_has_a_case() -> None:
    assert {*BY_HAND, "sensitivity", "perplexity", "taylor", "random"} == set(known())


# ---- a real model


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    shared: Path = request.getfixturevalue("shared")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = next((shared / "data" / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    rows = [ids[:200] for ids in tokenizer(text.split("<|endoftext|>")[:8]).input_ids]
    batches = []
    for start in (0, 4):
        longest = max(map(len, rows[start : start + 4]))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows[start : start + 4]])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows[start : start + 4]])
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return model.eval(), batches


def plain_states(model: Any, batch: dict[str, torch.Tensor]) -> list[list[np.ndarray]]:
    """For each row, the hidden states of its real tokens at each depth; the last is before the final norm."""
    before_norm: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    handle.remove()
    states = [*output.hidden_states[:-1], before_norm[0]]
    lengths = batch["attention_mask"].sum(1).tolist()
    return [[state[row, :length].double().numpy() for state in states] for row, length in enumerate(lengths)]


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


REFERENCES = {
    "block_influence": lambda x, y: 1 - cosine(x, y),
    "layer_redundancy": lambda x, y: -cosine(x, y),
    "activation_norm": lambda x, y: -np.linalg.norm(y, axis=-1),
    "relative_magnitude": lambda x, y: np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1),
    "angular": lambda x, y: np.arccos(cosine(x[-1:], y[-1:])) / np.pi,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_of_stories_against_plain_hidden_states(name: str, stories: Any) -> None:
    model, batches = stories
    rows = [row for batch in batches for row in plain_states(model, batch)]
    expected = [
        np.concatenate([REFERENCES[name](row[position], row[position + 1]) for row in rows]).mean() for position in range(5)
    ]
    scores = score_layers(model, batches, name)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_taylor_of_stories_against_finite_differences(stories: Any) -> None:
    model, batches = stories
    weight = model.model.layers[2].mlp.down_proj.weight
    others = [model.model.layers[i].post_attention_layernorm.weight for i in (0, 1, 3, 4)]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is held for held in (weight, *others)))
    scores = score_layers(model, batches, "taylor")
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def loss() -> torch.Tensor:
        parts = [model(**batch).loss * int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        return sum(parts) / total

    gradient, *of_others = torch.autograd.grad(loss(), (weight, *others))
    by_hand = [(held * found).abs().sum().item() for held, found in zip(others, of_others, strict=True)]
    assert scores[[0, 1, 3, 4]].tolist() == pytest.approx(by_hand, rel=1e-4)
    # along |w| sign(g) the loss rises by sum |w g| a unit
    direction, losses = weight.detach().abs() * gradient.sign(), []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            weight += step * direction
            losses.append(loss().item())
            weight -= step * direction
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert scores[2].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)


def test_random_and_rules_of_stories(stories: Any) -> None:
    model, _ = stories
    assert len(set(score_layers(model, [], "random").tolist())) == 5
    assert score_layers(model, [], "deepest_except_last").argsort().tolist() == [3, 2, 1, 0, 4]


# ---- other metrics of a scan


def without_each(model: Any) -> list[Any]:
    """The model without each block in turn, by another way than the scan's: its list of blocks is a shorter one."""
    models = []
    for position in range(len(model.layers)):
        smaller = ToyForCausalLM(model.config)
        smaller.layers = torch.nn.ModuleList([block for i, block in enumerate(model.layers) if i != position])
        models.append(smaller.eval())
    return models


def token_accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"eval_accuracy": float((guesses == labels)[labels != -100].mean()), "count": float((labels != -100).sum())}


@pytest.mark.parametrize("key", ["accuracy", "eval_accuracy"])
def test_any_compute_metrics(key: str) -> None:
    long = torch.tensor([[0, 2, 0, 3, 1, 3]])
    batches = [BATCH, {"input_ids": long, "labels": long}]
    metric = from_compute_metrics(key, token_accuracy, lambda logits, labels: logits.argmax(-1))
    model = toy_model()
    expected = []
    for smaller in without_each(model):
        hits = [
            (smaller(batch["input_ids"]).logits.argmax(-1)[:, :-1] == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
            for batch in batches
        ]
        expected.append(-torch.cat(hits).double().mean().item())
    assert score_layers(model, batches, metric=metric).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1
    as_loss = from_compute_metrics("count", token_accuracy, None, greater_is_better=False)
    logits_of = from_compute_metrics("loss", lambda p: {"eval_loss": float(p.predictions.shape[1])})
    assert score_layers(model, batches[:1], metric=logits_of).tolist() == [4, 4, 4, 4]  # a loss: greater is worse
    assert not as_loss.name == "loss" and as_loss.importance(3.0) == 3.0


def test_compute_metrics_without_the_key_lists_its_keys() -> None:
    metric = from_compute_metrics("f1", token_accuracy, lambda logits, labels: logits.argmax(-1))
    with pytest.raises(ValueError, match=r"to return 'f1', got \['count', 'eval_accuracy'\]. Set scan_metric"):
        score_layers(toy_model(), [BATCH], metric=metric)


def test_a_metric_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric among \['choice_accuracy', 'loss'\], got 'f1'.*compute_metrics"):
        score_layers(toy_model(), [BATCH], metric="f1")


def test_predictions_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 100

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    with pytest.raises(ValueError, match=r"fit in memory.*preprocess_logits_for_metrics"):
        score_layers(toy_model(), [BATCH], metric=from_compute_metrics("accuracy", token_accuracy), memory_gb=1)


def choice_rows() -> dict[str, torch.Tensor]:
    """Two questions of two choices: after token 0 comes 2 (right) or 1; after token 1 comes 3 or 1 (called right)."""
    ids = torch.tensor([[0, 2], [0, 1], [1, 3], [1, 1]])
    labels = torch.tensor([[-100, 2], [-100, 1], [-100, 3], [-100, 1]])
    return {
        "input_ids": ids,
        "labels": labels,
        "question": torch.tensor([0, 0, 1, 1]),
        "right": torch.tensor([1, 0, 0, 1]),
    }


def test_choice_accuracy_by_hand() -> None:
    # -2x points at the opposite token: 2 after 0 (right), 3 after 1 (called wrong): 1 of 2. With one turn only, 2Rx
    # points from 0 at 1 (wrong), from 1 at 2, at a right angle to both choices' vectors? 3 gives 0 and 1 gives 0: a tie.
    scores = score_layers(toy_model(), [choice_rows()], metric="choice_accuracy")
    assert scores.tolist() == [0, -0.5, -0.5, 0]


def test_choices_of_a_question_may_stand_in_different_batches() -> None:
    rows = choice_rows()
    apart = [{name: value[i::2] for name, value in rows.items()} for i in range(2)]
    assert score_layers(toy_model(), apart, metric="choice_accuracy").tolist() == [0, -0.5, -0.5, 0]


def test_choices_that_are_missing_are_refused() -> None:
    rows = choice_rows()
    del rows["right"]
    with pytest.raises(ValueError, match=r"choice_accuracy', got none of \['right'\].*calibration_dataset"):
        score_layers(toy_model(), [rows], metric="choice_accuracy")
    one = {name: value[:3] for name, value in choice_rows().items()}
    with pytest.raises(ValueError, match="at least two choices a question, one of them right, got 1 with 0 right"):
        score_layers(toy_model(), [one], metric="choice_accuracy")


# ---- from scores to layers


def test_the_lowest_scores_go_and_the_margin_is_told() -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, 1.5, 0.5])
    one = choose(scores, 1, 1, 1)
    assert (one.positions, one.scores, one.margin) == ([2], [1.0], 0.5)
    three = choose(scores, 3, 1, 1)
    assert (three.positions, three.scores, three.margin) == ([2, 3, 4], [1.0, 2.0, 1.5], 1.0)
    assert choose(scores, 6).margin is None


def test_ties_are_broken_by_the_other_score_and_only_then() -> None:
    asked: list[int] = []

    def breaker() -> torch.Tensor:
        asked.append(1)
        return torch.tensor([9.0, -1.0, -5.0, -3.0])

    assert choose(torch.tensor([1.0, 1.0, 1.0, 1.0]), tie_scores=breaker).positions == [2]
    assert choose(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2, tie_scores=breaker).positions == [2, 3]
    assert len(asked) == 2
    assert choose(torch.tensor([1.0, 0.5, 1.0, 1.0]), tie_scores=breaker).positions == [1]
    assert choose(torch.tensor([1.0, 1.0, 1.0, 1.0])).positions == [3]  # without one, the deepest
    assert len(asked) == 2


# ---- bad input


@pytest.mark.parametrize("name", ["sensitivity", "perplexity", "taylor"])
def test_scores_that_need_labels_say_so(name: str) -> None:
    unlabelled = {"input_ids": IDS, "attention_mask": MASK}
    with pytest.raises(ValueError, match=r"Expected calibration batches with labels, got only \['attention_mask'"):
        score_layers(toy_model(), [unlabelled], name)


@pytest.mark.parametrize("name", ["sensitivity", "perplexity", "taylor"])
def test_labels_that_are_all_ignored_say_so(name: str) -> None:
    ignored = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    with pytest.raises(ValueError, match=r"labels.*-100"):
        score_layers(toy_model(), [ignored], name)


@pytest.mark.parametrize("name", ["sensitivity", "perplexity", "block_influence", "angular", "activation_norm", "taylor"])
def test_what_is_not_a_number_names_layers_and_batch(name: str) -> None:
    model = make_model("LlamaForCausalLM")
    batches = make_batches(model)
    model.model.embed_tokens.weight.data[60] = float("nan")
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clamp(max=59)
    batches[1]["input_ids"] = torch.full_like(batches[1]["input_ids"], 60)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3, 4\] in batch 1\."):
        score_layers(model, batches, name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scan_metric": "accuracy", "importance": "block_influence"}, "importance='sensitivity' for scan_metric='acc"),
        ({"scan_metric": "accuracy", "importance": "perplexity"}, "importance='sensitivity' for scan_metric='acc"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrimConfig(target_layers=2, **changes)
