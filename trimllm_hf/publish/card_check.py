"""Checks that the Hub accepts and understands a model card's metadata."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..layer_map import LayerMap
from ..utils import as_list, checksum, json_at
from .contents import CARD, Contents
from .folder import REPORT, is_repo_id

RELATIONS = ("adapter", "merge", "quantized", "finetune")
PLACEHOLDER = "[More Information Needed]"  # of the Hub's own template


def check_card(contents: Contents, layer_map: LayerMap) -> ModelCard:
    """The folder's card, after checking that its metadata are valid and that it contains no placeholder.

    Raises:
        ValueError: If there is no card, or it is invalid.
    """
    path = contents.folder / CARD
    if CARD not in contents.sizes:
        raise ValueError(
            f"Expected a model card in {path}, got none. Render it (trimllm card {contents.folder}), or write one."
        )
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"Expected YAML metadata at the head of {path}, got: {error}. Render the card again.") from None
    # As written: ModelCard has already converted its data (a string given for tags becomes a list of its letters).
    block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
    problems = _problems(yaml.safe_load(block[2]) or {} if block else {})
    if PLACEHOLDER in card.text:
        problems.append(f"{PLACEHOLDER!r} in the text")
    if problems:
        raise ValueError(
            f"Expected a finished card in {path}, got {'; '.join(problems)}. Fix it by hand, or render it again."
        )
    _check_report(contents, layer_map)
    return card


def _check_report(contents: Contents, layer_map: LayerMap) -> None:
    """Refuse a card whose report was made from other weights, such as those of an earlier run."""
    if REPORT not in contents.sizes:
        return
    report: Any = json_at(contents.folder / REPORT)
    trimmed = (report.get("trimmed") if isinstance(report, dict) else None) or {}
    kept = (trimmed.get("map") or {}).get("kept_layers", list(layer_map.kept_layers))
    stale = [
        name
        for name, digest in (trimmed.get("sha256") or {}).items()
        if name.endswith(".safetensors")
        and (name not in contents.sizes or checksum(contents.folder / name, large=True) != digest)
    ]
    if stale or kept != list(layer_map.kept_layers):
        raise ValueError(
            f"Expected the card in {contents.folder} to describe these weights, got measurements of others ({REPORT} "
            f"differs in {stale[0] if stale else 'the kept layers'}). Render it again (trimllm card {contents.folder})."
        )


def _problems(data: dict[str, Any]) -> list[str]:
    found = []
    if not data:
        return ["no metadata (the block between two lines of --- at its head)"]
    if not data.get("library_name"):
        found.append("no library_name (without 'transformers' the Hub shows no way to load it)")
    for base in as_list(data.get("base_model")):
        if not is_repo_id(base):
            found.append(f"base_model {base!r}, which is not a model id of the Hub (omit it for a base of your own)")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        found.append(f"base_model_relation {relation!r}, of which the Hub knows {', '.join(RELATIONS)}")
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            found.append(f"{name} {value!r}, which is not a list of strings")
    return found
