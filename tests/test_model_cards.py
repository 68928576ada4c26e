"""The committed cards are what their committed reports say, pictures included, and tell nothing of a machine."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trimllm_hf.publish import pictures
from trimllm_hf.publish.card import CARD, REPORT, render
from trimllm_hf.publish.card_data import TrimCardData

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
FIRST_BLOCKS = {"classification-demo"}  # what it costs outside the domain is not measured by that recipe
CARDS = sorted(path.parent for path in FOLDER.glob(f"*/{REPORT}"))


def report_of(card: Path) -> TrimCardData:
    return TrimCardData.from_report(json.loads((card / REPORT).read_text(encoding="utf-8")))


def test_there_are_cards() -> None:
    demos = {f"{name}-demo" for name in ("medical", "legal", "finance", "classification")}
    assert demos | {"medical-medquad"} <= {card.name for card in CARDS}
    assert {card.parent for card in FOLDER.glob(f"*/{CARD}")} == set(CARDS), "a card without its report"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_card_is_what_its_report_says(card: Path) -> None:
    assert render(report_of(card)) == (card / CARD).read_text(encoding="utf-8"), "render it again: see model_cards/README.md"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_pictures_are_what_its_report_says(card: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.testing.compare", reason="matplotlib is not installed")
    data = report_of(card)
    # classification.py drops all before the first step: it has a table of depths, and no curve of one run
    curve = [] if card.name in FIRST_BLOCKS else [pictures.CURVE]
    drawn = pictures.draw(data, tmp_path)
    assert drawn == data.pictures and {pictures.STRIP, *curve, pictures.WHAT_IF} <= set(drawn)
    for name in data.pictures:
        # a root mean square over the pixels: fonts are drawn a little differently by versions of FreeType
        assert image.compare_images(str(card / name), str(tmp_path / name), tol=5) is None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_nothing_of_a_machine_and_nothing_unmeasured_passes_for_a_figure(card: Path) -> None:
    for name in (CARD, REPORT):
        text = (card / name).read_text(encoding="utf-8")
        assert not re.search(r"(^|[\s\"'`=(])/(?!trimllm_hf|>)[\w.-]+/", text), f"{name} names an absolute path"
        assert not re.search(r"hf_\w{8}|NaN|Infinity", text)
    data, text = report_of(card), (card / CARD).read_text(encoding="utf-8")
    assert data.latency["speedups"] and data.usage["output"] in text and data.quality
    assert bool(data.outside) == (card.name not in FIRST_BLOCKS) == ("Not measured. Dropping layers" not in text)
    metadata = yaml.safe_load(text.split("---\n")[1])
    values = [metric["value"] for part in metadata["model-index"][0]["results"] for metric in part["metrics"]]
    assert values == [quality.trimmed.value for quality in (*data.quality, *data.outside)]
