"""Render the cards in this folder again, each from its trim_report.json alone: what to run after a change of the template.

The report keeps its figures; only which pictures they allow is written anew.

python model_cards/render.py
"""

import json
from pathlib import Path

from trimllm_hf.publish import pictures
from trimllm_hf.publish.card import CARD, REPORT, render
from trimllm_hf.publish.card_data import TrimCardData

for report in sorted(Path(__file__).parent.glob(f"*/{REPORT}")):
    data = TrimCardData.from_report(json.loads(report.read_text(encoding="utf-8")))
    data.pictures = pictures.draw(data, report.parent)
    report.write_text(json.dumps(data.to_report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (report.parent / CARD).write_text(render(data), encoding="utf-8")
