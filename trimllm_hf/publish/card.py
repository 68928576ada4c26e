"""The model card: written from measurements, rendered again from `trim_report.json` alone; edits by hand are kept."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData
from huggingface_hub.repocard import RepoCard
from transformers import AutoConfig
from transformers.utils import logging

from ..layer_map import LayerMap
from ..loading.readers import unknown_to_stock
from ..surgery.remote_code import is_our_code
from . import pictures
from .card_data import TrimCardData
from .figures import cost_rows, dropped, history_rows, map_of, quality_rows, repair_rows, summary, text_strip
from .folder import REPORT, describe_base, describe_trimmed
from .measure import measure_for_card
from .usage import SEQ2SEQ, run_example
from .widths import text_widths, widths_of

logger = logging.get_logger("transformers.trimllm_hf")

CARD = "README.md"
NOT_OURS = "not run: the code beside the weights is not trimllm_hf's, and trust_remote_code was not given"
TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
SECTION = re.compile(r"<!-- trimllm_hf: (?P<name>[\w-]+) -->\n.*?<!-- /trimllm_hf: (?P=name) -->", re.DOTALL)
# Metadata that are always written from the data; the user may change the others by hand.
OURS = ("library_name", "model-index")


def write_card(
    folder: str | Path,
    data: TrimCardData | None = None,
    base: str | None = None,
    measured: bool = True,
    trust_remote_code: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Write a folder's card with its pictures and `trim_report.json`.

    Fields that `data` leaves out are taken from an earlier report in the folder; if the weights have changed since, only
    those that the user gave. Edits by hand are kept: only the sections between the `trimllm_hf` markers are rewritten, and
    sections whose markers were removed are not added again.

    Args:
        folder: A trimmed model's folder, as `save_model` leaves it.
        data: What the files do not say; see `TrimCardData`.
        base: The base's Hub id or folder, if the model's map does not name it or names a folder that has moved.
        measured: Measure latency beside the base, and run the usage example, where the report does not hold it yet.
        trust_remote_code: Run the code beside the weights. Without it only code that `write_remote_code` wrote is run, after
            an exact comparison.
        progress: Whether to show a bar while latency is measured.
        **settings: For `measure_latency`: `batch_sizes`, `prompt_tokens`, `new_tokens`, `repeats`, …

    Returns:
        The card's path.

    Raises:
        ValueError: If the folder's map, or its earlier report, is damaged.
        OSError: If the folder holds no model.
    """
    folder = Path(folder)
    trimmed = describe_trimmed(folder, trust_remote_code)
    earlier = read_report(folder)
    data = _joined(data or TrimCardData(), earlier, trimmed)
    known, revision = _named_base(folder, trust_remote_code)
    if base is not None and base != known:
        known, revision, data.base = base, None, None
    given = data.base_model if isinstance(data.base_model, str) else None
    if data.base is None and given is not None and given != known:
        data.base = describe_base(given, None)
    data.base = data.base or describe_base(known, revision)
    if measured and (settings or data.latency is None):
        how = {"trust_remote_code": trust_remote_code, "progress": progress, **settings}
        data.latency = measure_for_card(folder, known, revision, **how)
    refused = trust_remote_code and (data.usage or {}).get("remote_code") == NOT_OURS
    if measured and (data.usage is None or refused):
        layer_map = map_of(data)
        kind = SEQ2SEQ if layer_map.part else data.to_dict().get("pipeline_tag")
        asked = (folder, kind, data.usage_prompt)
        data.usage = run_example(*asked, stock=layer_map.has_all_sublayers and "slicing" not in trimmed)
        if trimmed["remote_code"] and "code" in data.usage:
            trusted = trust_remote_code or is_our_code(folder)
            tried = run_example(*asked, stock=True, remote_code=True) if trusted else {"not_run": NOT_OURS}
            data.usage["remote_code"] = tried.get("not_run", "ran")
    data.pictures = pictures.draw(data, folder)
    path = folder / CARD
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    text = merged(existing, render(data), None if earlier is None else render(earlier))
    (folder / REPORT).write_text(json.dumps(data.to_report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    return path


def _joined(given: TrimCardData, earlier: TrimCardData | None, trimmed: dict[str, Any]) -> TrimCardData:
    """The given data, completed by an earlier report; if that is of other weights, only by what the user gave."""
    data = copy.copy(given)
    data.trimmed = trimmed
    if earlier is None:
        return data
    same = earlier.trimmed is not None and _weights(earlier.trimmed) == _weights(trimmed)
    if not same:
        logger.warning("The weights have changed since the report was written: what was measured on them is left out.")
    measured = {"quality", "outside", *data.FILLED}
    for name, value in vars(earlier).items():
        if not getattr(data, name, None) and (same or name not in measured):
            setattr(data, name, value)
    return data


def _weights(trimmed: dict[str, Any]) -> dict[str, str]:
    return {name: digest for name, digest in trimmed["sha256"].items() if name.endswith(".safetensors")}


def _named_base(folder: Path, trust_remote_code: bool) -> tuple[str | None, str | None]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    slicing = getattr(config, "slicing", None)
    if slicing is not None and getattr(config, "trim", None) is None:
        return slicing["base_model"], slicing["base_revision"]
    layer_map = LayerMap.from_config(config)
    return layer_map.base_model, layer_map.base_revision


def render(data: TrimCardData) -> str:
    """The card of a report: a pure function of it.

    Raises:
        ValueError: If the report does not say which layers are kept.
    """
    layer_map = map_of(data)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    widths = widths_of((data.trimmed or {}).get("slicing"))
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        data=data,
        metadata=data.to_dict(),
        map=layer_map,
        summary=summary(data),
        cost=cost_rows(data),
        quality=quality_rows(data.quality),
        outside=quality_rows(data.outside),
        strip=pictures.STRIP if pictures.STRIP in data.pictures else None,
        curve=pictures.curve_of(data) if pictures.CURVE in data.pictures else None,
        curve_file=pictures.CURVE,
        importance=pictures.first_scan(data) if pictures.IMPORTANCE in data.pictures else None,
        importance_file=pictures.IMPORTANCE,
        loss_file=pictures.LOSS if pictures.LOSS in data.pictures else None,
        what_if_file=pictures.WHAT_IF if pictures.WHAT_IF in data.pictures else None,
        score=pictures.score_in_words(layer_map),
        pictures=data.pictures,
        run=data.training,
        text_strip=text_strip(layer_map),
        dropped=dropped(layer_map),
        widths=widths,
        unknown=unknown_to_stock(layer_map, widths is not None),
        text_widths=None if widths is None else text_widths(widths.full, widths.kept),
        widths_file=pictures.WIDTHS if pictures.WIDTHS in data.pictures else None,
        history=history_rows(layer_map),
        repairs=repair_rows(data.training),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def read_report(folder: Path) -> TrimCardData | None:
    """The report in a folder, or None.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        return TrimCardData.from_report(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON in {path}, got: {error}. Delete it and write the card anew.") from None


def merged(existing: str | None, new: str, generated_before: str | None) -> str:
    """The new card, with the edits by hand of the existing one.

    Args:
        existing: The card in the folder.
        new: The card as it is rendered now.
        generated_before: The existing card as it was rendered, to tell edits of the metadata by hand from ours.
    """
    if existing is None or existing == generated_before:
        return new
    old_card, new_card = RepoCard(existing), RepoCard(new)  # their metadata are plain dicts
    ours_before = {} if generated_before is None else RepoCard(generated_before).data.to_dict()
    metadata, by_hand = new_card.data.to_dict(), old_card.data.to_dict()
    for name, value in by_hand.items():
        if name not in OURS and value != ours_before.get(name):
            metadata[name] = value
    sections = {match["name"]: match[0] for match in SECTION.finditer(new_card.text)}
    if SECTION.search(old_card.text):
        text = SECTION.sub(lambda match: sections.get(match["name"], match[0]), old_card.text)
    else:
        text = f"{old_card.text.rstrip()}\n\n{new_card.text.lstrip()}"
    return f"---\n{CardData(**metadata).to_yaml()}\n---\n{text}"
