"""A Trainer whose model wraps a transformers model, as Sentence-Transformers' does: layers are scored by its own loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import arguments
from tiny import tokens
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel, BertTokenizerFast, Trainer

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, drop_layers
from trimllm_hf.training.trainer_batches import as_called

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


class Embedder(nn.Module):
    """Mean over tokens of an encoder's states; called with a dict, and without a config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = BertModel(BertConfig(**SIZES, num_hidden_layers=6), add_pooling_layer=False)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        states = self.encoder.forward(**features).last_hidden_state  # past the hooks, as some libraries do
        return self.dropout(states.mean(dim=1))


class Pairs(Trainer):
    """A text's own answer among those of the batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        one, other = (normalize(model({"input_ids": inputs[name]}), dim=1) for name in ("anchor", "positive"))
        loss = cross_entropy(20 * one @ other.T, torch.arange(len(one)))
        return (loss, {}) if return_outputs else loss


def pairs(size: int = 40) -> list[dict[str, torch.Tensor]]:
    anchors, positives = tokens(size, 8, seed=1), tokens(size, 8, seed=2)
    return [{"anchor": anchor, "positive": positive} for anchor, positive in zip(anchors, positives, strict=True)]


def train(folder: Path, **trim: Any) -> Trainer:
    args = arguments(folder, max_steps=4, remove_unused_columns=False, per_device_train_batch_size=4)
    settings = {"target_layers": 5, "calibration_size": 8, "drop_every": "once", "repair": "none", **trim}
    callback = TrimCallback(TrimConfig(**settings), calibration_dataset=pairs(8))
    trainer = Pairs(Embedder(), args, train_dataset=pairs(), callbacks=[callback])
    trainer.train()
    return trainer


def test_layers_inside_are_scored_by_the_loss_of_what_wraps_them(tmp_path: Path) -> None:
    trainer = train(tmp_path, importance="sensitivity", warm_up_importance="none")
    encoder = trainer.model.encoder
    (record,) = LayerMap.from_config(encoder.config).history
    rows, losses = pairs(8), []
    for position in range(1, 5):
        model = Embedder().eval()
        drop_layers(model, [position])
        with torch.no_grad():
            batches = [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in (rows[:4], rows[4:])]
            losses.append(sum(trainer.compute_loss(model, batch).item() for batch in batches) / 2)
    assert record.dropped == (1 + losses.index(min(losses)),) and record.scores == (pytest.approx(min(losses), rel=1e-4),)
    assert len(encoder.encoder.layer) == encoder.config.num_hidden_layers == 5 and trainer.state.global_step == 4


@pytest.mark.parametrize(
    "trim",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"repair": "auto"}, {"importance": "last"}))],
    ids=str,
)
def test_other_scores_look_at_what_the_model_inside_is_called_with(trim: dict[str, Any], tmp_path: Path) -> None:
    trainer = train(tmp_path, **trim)
    assert len(trainer.model.encoder.encoder.layer) == 5 and trainer.model.dropout.training


class ByPlace(Embedder):
    """Passes the tokens by place."""

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dropout(self.encoder(features["input_ids"]).last_hidden_state.mean(dim=1))


def test_what_is_passed_by_place_has_a_name(tmp_path: Path) -> None:
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = Pairs(ByPlace(), args, train_dataset=pairs())
    model: Any = trainer.model
    batch = {name: torch.stack([row[name] for row in pairs(4)]) for name in ("anchor", "positive")}
    called = as_called(trainer, model.encoder, batch, 4)
    assert (
        called.has_loss and list(called.inputs) == ["input_ids"] and torch.equal(called.inputs["input_ids"], batch["anchor"])
    )
    assert "forward" not in vars(model.encoder)


def test_the_documented_snippet_for_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own lines; run by hand with 6.2, since it is no requirement of the tests."""
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # scikit-learn sets them, if they are not set
        monkeypatch.setenv(name, "TRUE" if name.endswith("OK") else "FALSE")
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is no requirement of the tests")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    BertModel(BertConfig(**SIZES, num_hidden_layers=6)).save_pretrained(base)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
    (base / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(base / "vocab.txt")).save_pretrained(base)
    library.SentenceTransformer(str(base), device="cpu").save_pretrained("org/embedder")
    rows = [{"anchor": f"w{i % 50} w{(i + 1) % 50}", "positive": f"w{(i + 1) % 50} w{(i + 2) % 50}"} for i in range(160)]
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.partition("## sentence-transformers")[2].partition("\n## ")[0]
    names: dict[str, Any] = {"pairs": Dataset.from_list(rows)}
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S):
        exec(code, names)
    again = library.SentenceTransformer("small-embedder", device="cpu")
    assert len(again[0].auto_model.encoder.layer) == 3
    assert (again.encode(["w1 w2", "w3"]) == names["model"].encode(["w1 w2", "w3"])).all()
