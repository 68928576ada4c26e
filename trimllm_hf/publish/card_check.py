"""Whether a model card's metadata are what the Hub takes and understands."""

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
    """The folder's card, once its metadata are found right and nothing in it waits to be filled in.

    Raises:
        ValueError: If there is no card, or it is wrong.
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
    # As written: the card's own data are mended already (a text for tags becomes a list of its letters).
    block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
    problems = _problems(yaml.safe_load(block[2]) or {} if block else {})
    if PLACEHOLDER in card.text:
        problems.append(f"{PLACEHOLDER!r} in the text")
    if problems:
        raise ValueError(
            f"Expected a finished card in {path}, got {'; '.join(problems)}. Mend it by hand, or render it again."
        )
    _check_report(contents, layer_map)
    return card


def _check_report(contents: Contents, layer_map: LayerMap) -> None:
    """The report that the card is rendered from must be of these weights, not of those of an earlier run."""
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
            f"Expected the card in {contents.folder} to tell of these weights, got measurements of others ({REPORT} differs "
            f"in {stale[0] if stale else 'the kept layers'}). Render it again (trimllm card {contents.folder})."
        )


def _problems(data: dict[str, Any]) -> list[str]:
    found = []
    if not data:
        return ["no metadata (the block between two lines of --- at its head)"]
    if not data.get("library_name"):
        found.append("no library_name (without 'transformers' the Hub shows no way to load it)")
    for base in as_list(data.get("base_model")):
        if not is_repo_id(base):
            found.append(f"base_model {base!r}, which is no model id of the Hub (leave it out for a base of your own)")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        found.append(f"base_model_relation {relation!r}, of which the Hub knows {', '.join(RELATIONS)}")
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            found.append(f"{name} {value!r}, which is no list of texts")
    return found
