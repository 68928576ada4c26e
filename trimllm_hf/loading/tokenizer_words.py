"""Writes a tokenizer beside a trimmed model in terms that transformers 4 and tools built on it (CTranslate2) also know."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "tokenizer_config.json"


def use_older_words(folder: Path) -> None:
    """Write a tokenizer's class and special tokens in a trimmed model's folder in the format of published tokenizers.

    transformers 5 writes the class `TokenizersBackend` and a list of `extra_special_tokens`, on which transformers 4 fails;
    transformers 5 reads the older format as well. A folder without a trimmed model is left alone.
    """
    described, model = folder / CONFIG, folder / "config.json"
    try:
        if "trim" not in json.loads(model.read_text(encoding="utf-8")):
            return
        plain = json.loads(described.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return  # one is missing or unreadable
    older = dict(plain)
    if plain.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(plain.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older != plain:
        described.write_text(json.dumps(older, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
