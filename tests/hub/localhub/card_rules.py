"""What the Hub refuses in a model card's metadata."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

# A part of the Hub's list (hub-docs, "repositories-licenses").
LICENSES = set(
    "apache-2.0 mit openrail cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 bsd-3-clause gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 "
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma other unknown".split()
)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_problems(text: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """Errors, warnings and metadata of a README.md."""
    match = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---([\r\n]|$))", text)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"], {}
    try:
        data = yaml.safe_load(match[2]) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], [], {}
    if not isinstance(data, dict):
        return ["repo card metadata block should be a dict"], [], {}
    errors = [f'"license" must be one of {sorted(LICENSES)}' for x in as_list(data.get("license")) if x not in LICENSES]
    for key in ("base_model", "datasets"):
        for value in as_list(data.get(key)):
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value {json.dumps(value)} is not valid. Use an id of the Hub.')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for key in ("tags", "datasets", "metrics"):
        if key in data and not (isinstance(data[key], list) and all(isinstance(x, str) for x in data[key])):
            errors.append(f'"{key}" must be an array')
    for i, model in enumerate(data.get("model-index") or []):
        if "name" not in model or not isinstance(model.get("results"), list):
            errors.append(f'"model-index[{i}]" needs "name" and "results"')
            continue
        for j, result in enumerate(model["results"]):
            errors += [f'"model-index[{i}].results[{j}].{missing}" is required' for missing in missing_in(result)]
    warnings = ['"license: other" without "license_name"'] if data.get("license") == "other" else []
    return errors, warnings if not data.get("license_name") else [], data


def missing_in(result: dict[str, Any]) -> list[str]:
    missing = [] if (result.get("task") or {}).get("type") else ["task.type"]
    missing += [f"dataset.{key}" for key in ("name", "type") if not (result.get("dataset") or {}).get(key)]
    for k, metric in enumerate(result.get("metrics") or [{}]):
        missing += [f"metrics[{k}].{key}" for key in ("type", "value") if key not in metric]
    return missing


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
