"""Modelling code beside the weights: with `trust_remote_code=True`, custom models load without trimllm_hf."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from ..utils import json_at
from .custom_models import CustomModel, class_as

MODULE = "modeling_trimllm"
TEMPLATE = "modeling.py.txt"
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}


def write_remote_code(folder: str | Path) -> Path:
    """Write modelling code for a saved model that lacks sublayers or is sliced, and reference it in its config.json.

    `from_pretrained(folder, trust_remote_code=True)` then loads the model where trimllm_hf is not installed.

    Args:
        folder: The folder that `save_pretrained` wrote.

    Returns:
        The path of the code file.

    Raises:
        ValueError: If the folder holds no such model. A model that lost only whole blocks needs no code.
    """
    folder = Path(folder)
    plain = json_at(folder / "config.json")
    custom = _custom_of(folder, plain)
    if custom is None:
        raise ValueError(
            f"Expected the folder of a saved model that lacks sublayers or is sliced, got {str(folder)!r}, whose "
            "config.json is not of a model type of trimllm_hf. A model that lost whole blocks loads as it is."
        )
    code, auto_map = _remote_code(custom, plain)
    file = folder / f"{MODULE}.py"
    file.write_text(code, encoding="utf-8")
    text = json.dumps({**plain, "auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return file


def is_our_code(folder: str | Path) -> bool:
    """Whether the code beside a model's weights is exactly what `write_remote_code` writes for its config."""
    folder = Path(folder)
    try:
        plain = json_at(folder / "config.json")
        custom = _custom_of(folder, plain)
        if custom is None:
            return False
        code, auto_map = _remote_code(custom, plain)
    except (ValueError, AttributeError, KeyError, TypeError):  # a damaged config
        return False
    scripts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return plain.get("auto_map") == auto_map and scripts == {f"{MODULE}.py": code}


def _custom_of(folder: Path, plain: Any) -> CustomModel | None:
    """The custom kind of the model in a folder; None for a stock model."""
    if not isinstance(plain, dict) or "base_model_type" not in plain:
        return None
    return getattr(type(AutoConfig.from_pretrained(folder, trust_remote_code=False)), "custom", None)


def _remote_code(custom: CustomModel, plain: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The code for a saved config, and the `auto_map` that references it."""
    stock = custom.from_saved_config(plain)
    (name,) = stock["architectures"]
    model_class, config_class = getattr(transformers, name), transformers.CONFIG_MAPPING[stock["model_type"]]
    with torch.device("meta"):
        model = class_as(model_class, custom)(custom.cast(config_class.from_dict(dict(stock))))
    body, values = custom.code(model)
    values = {
        "BODY": body,
        "GONE": custom.warning,
        "SUMMARY": custom.summary,
        "PREFIX": custom.prefix,
        "CONFIG": config_class.__name__,
        "MODEL": name,
        "MODEL_TYPE": custom.model_type,
        "BASE_TYPE": config_class.model_type,
        "LAYERS": str(custom.depth(plain)),
        "DEPTH": repr(tuple(_path_to(custom.warning, plain))),
        **values,
    }
    text = template(__package__, TEMPLATE)
    for key, value in values.items():
        text = text.replace(f"<{key}>", value)
    autos = [
        auto
        for auto, mapping in _AUTO.items()
        if getattr(transformers, mapping).get(config_class, None) in (model_class, (model_class,))
    ]
    auto_map = {"AutoConfig": f"{MODULE}.{custom.prefix}{config_class.__name__}"}
    return text, auto_map | {auto: f"{MODULE}.{custom.prefix}{name}" for auto in autos}


def template(package: str | None, name: str) -> str:
    """The text of a file in a subpackage's folder `templates`."""
    return files(package or __package__).joinpath("templates", name).read_text(encoding="utf-8")


def _path_to(value: Any, plain: dict[str, Any]) -> list[str]:
    for name, found in plain.items():
        if found == value:
            return [name]
        if isinstance(found, dict) and (rest := _path_to(value, found)):
            return [name, *rest]
    return []
