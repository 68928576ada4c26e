"""A small base model with its tokenizer, in a folder, and labelled texts that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{n}" for n in range(40)]
LABELS = ("bearish", "bullish", "neutral")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save_base(folder: Path, family: str = "llama") -> str:
    """A model of six layers with random weights (an encoder without a head, if it is BERT); a word is a token."""
    asked = "Question : Answer Is this bearish , bullish or neutral ? What is about good bad so".split()
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys([*SPECIAL.values(), *asked, *LABELS, *WORDS]))}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=word_level, **SPECIAL).save_pretrained(folder)
    model = tiny_model(family)
    (model.bert if family == "bert" else model).save_pretrained(folder)
    return str(folder)


def save_texts(path: Path, size: int, seed: int) -> str:
    """Texts whose first word tells the label; the others are noise."""
    rng = random.Random(seed)
    rows = []
    for n in range(size):
        label = n % len(LABELS)
        first = rng.choice(WORDS[label * 3 : label * 3 + 3])
        rows.append({"text": " ".join([first, *rng.choices(WORDS[9:], k=4)]), "label": LABELS[label]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
