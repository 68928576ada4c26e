"""Every type that transformers knows: trimmed exactly, or refused untouched."""

from __future__ import annotations

import pytest
import torch
import transformers
from check import check_blocks, skipping
from check_sublayers import check_sublayers
from kinds import CAUSAL, CLASSIFICATION, DECODER, ENCODER, MULTIMODAL, Kind
from sweep import DOCS, PARTS, Check, counts, page, run, workers
from zoo_models import tiny_model

from trimllm_hf.importance import evaluate_metric
from trimllm_hf.importance.lazy import PassedOver
from trimllm_hf.surgery.blocks import find_blocks
from trimllm_hf.surgery.drop import plan_drop

# One for each way in which a config speaks of layers.
EXACT = [
    (CAUSAL, "llama"),  # a depth
    (CAUSAL, "gpt2"),  # a depth by another name
    (CAUSAL, "gemma3_text"),  # a type for each layer
    (CAUSAL, "qwen3_moe"),  # numbers of layers, and a step
    (CAUSAL, "llama4_text"),  # numbers of layers
    (CAUSAL, "deepseek_v3"),  # the first so many
    (CAUSAL, "jamba"),  # periods with offsets
    (CAUSAL, "qwen3_next"),  # an interval, and types made from it
    (CAUSAL, "recurrent_gemma"),  # a pattern that is repeated
    (CAUSAL, "gpt_neo"),  # a pattern in shorthand
    (CAUSAL, "gemma4_unified_text"),  # overrides by number
    (CAUSAL, "gemma3n_text"),  # tensors that hold a part for each layer
    (CAUSAL, "minicpm3"),  # a scale by the depth
    (CAUSAL, "bart"),  # the decoder's own depth
    (CAUSAL, "ctrl"),  # blocks without a mark
    (CAUSAL, "zamba2"),  # blocks that share weights
    (CAUSAL, "big_bird"),  # an attention of another class once it has seen a short input
    (CLASSIFICATION, "bert"),
    (CLASSIFICATION, "modernbert"),  # a type for each layer, in an encoder
    (CLASSIFICATION, "distilbert"),
    (DECODER, "bart"),  # two depths in one config
    (DECODER, "t5"),  # parts with configs of their own, made from the model's
    (DECODER, "t5gemma"),  # two configs of one class
    (ENCODER, "bart"),
    (ENCODER, "t5gemma"),
    (MULTIMODAL, "gemma3"),  # a text part
]
REFUSED = {
    "diffllama": "lambda_init",
    "beam": "residual_add_idx",
    "xlm": "Expected one list of 6 blocks",
}
LEAST_BUILT = {CAUSAL.name: 170, CLASSIFICATION.name: 100, DECODER.name: 20, ENCODER.name: 20, MULTIMODAL.name: 40}


@pytest.mark.parametrize(("kind", "model_type"), EXACT, ids=lambda value: value.name if isinstance(value, Kind) else value)
def test_two_blocks_go_exactly(kind: Kind, model_type: str) -> None:
    outcome = check_blocks(kind, model_type, verified=1)
    assert outcome.status == "exact", outcome


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_a_config_cannot_say_is_refused_untouched(model_type: str) -> None:
    if model_type not in set(CAUSAL.types()):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    outcome = check_blocks(CAUSAL, model_type, choices=[(1, 4)])
    assert outcome.status == "refused", outcome
    assert REFUSED[model_type] in outcome.detail


def test_what_a_config_says_of_the_last_layers_goes_exactly() -> None:
    outcome = check_blocks(CAUSAL, "diffllama", choices=[(4, 5)], verified=1)  # its lambda is of a layer's number
    assert outcome.status == "exact", outcome


@pytest.mark.parametrize("layers", [(1, 3), (0, 2)])
def test_layers_whose_keys_others_read_stay(layers: tuple[int, ...]) -> None:
    outcome = check_blocks(CAUSAL, "gemma4_text", choices=[layers])
    assert outcome.status == "refused" and "later ones read their keys and values" in outcome.detail, outcome


# One for each way in which a block holds its halves.
SUBLAYER_KINDS = [
    "llama",  # a norm before each
    "gemma2",  # norms around each
    "olmo2",  # a norm behind each
    "falcon",  # side by side
    "gpt2",  # others' names
    "opt",  # an MLP that is no module
    "bert",  # a residual inside the modules
    "big_bird",  # an attention that is asked to be another
    "mixtral",  # experts
]


@pytest.mark.parametrize("model_type", SUBLAYER_KINDS)
def test_halves_of_two_blocks_go_exactly(model_type: str) -> None:
    outcome = check_sublayers(CAUSAL, model_type)
    assert outcome.status == "exact", outcome


def test_the_readme_counts_as_the_page_does() -> None:
    readme = (DOCS.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in DOCS.read_text(encoding="utf-8").splitlines()]
    for kind, unit, types, exact, *_ in (row for row in rows if len(row) == 8 and row[2].isdigit()):
        if (kind, unit) in ((CAUSAL.name, "blocks"), (CAUSAL.name, "sublayers"), (CLASSIFICATION.name, "blocks")):
            assert f"{exact} of {types} {kind} types" in readme.replace("\n", " "), (kind, unit)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # each type has its own limit; together some minutes on two idle cores
@pytest.mark.parametrize(("unit", "kind", "check"), PARTS, ids=lambda value: getattr(value, "name", None))
def test_no_type_goes_wrong(unit: str, kind: Kind, check: Check) -> None:
    with workers() as pool:
        outcomes = run(pool, kind, check, kind.types())
    bad = [outcome for outcome in outcomes if outcome.status in ("wrong", "crash")]
    assert not bad, bad
    number = counts(outcomes)
    if unit == "sublayers":
        assert number["exact"] >= 120, number
    else:
        assert number["exact"] + number["refused"] >= LEAST_BUILT[kind.name], number
        assert number["exact"] >= 0.9 * (number["exact"] + number["refused"]), number
    written = DOCS.read_text(encoding="utf-8")
    if f"transformers ({transformers.__version__})" in written:
        begins = f"| {kind.name} | {unit} | "
        (line,) = [row for row in page(**{unit: {kind.name: outcomes}}).splitlines() if row.startswith(begins)]
        assert line in written, "run python tests/zoo/sweep.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [CAUSAL, DECODER, CLASSIFICATION, MULTIMODAL], ids=lambda kind: kind.name)
def test_blocks_that_could_go_are_passed_over_exactly(kind: Kind) -> None:
    """By the default score sets of blocks are compared without computing them: as if each had run and changed nothing."""
    right, wrong = 0, []
    for model_type in kind.types():
        try:
            model = tiny_model(kind.auto_class, model_type)
            batch = kind.inputs(model)
            batch["labels"] = batch.get("decoder_input_ids", batch["input_ids"])
            if kind is CLASSIFICATION:
                batch["labels"] = torch.tensor([0, 1])
            full, blocks = evaluate_metric(model, [batch]), find_blocks(model, kind.part).blocks
        except Exception:  # not built, or without a loss
            continue
        for layers in ([1, 4], [1, 2, 3]):
            try:
                plan_drop(model, layers, part=kind.part)
            except ValueError:
                continue
            with skipping([blocks[layer] for layer in layers]):
                expected = evaluate_metric(model, [batch])
            try:
                with PassedOver(model, kind.part).without(layers):
                    found = [evaluate_metric(model, [batch]) for _ in range(2)]
            except ValueError as error:
                assert "return their hidden states, alone or first" in str(error), (model_type, error)
                continue
            alike = found == pytest.approx([expected] * 2, rel=1e-4) and evaluate_metric(model, [batch]) == pytest.approx(
                full
            )
            right += alike
            wrong += [] if alike else [model_type]
    assert set(wrong) <= {"zaya"}  # a block of it hands its router's state on as well, which a scan takes from the block
    assert right >= LEAST_BUILT[kind.name], (kind.name, right)
