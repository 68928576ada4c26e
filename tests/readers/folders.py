"""Tiny models of the zoo as folders for other readers: each base as the Hub spells it, and trimmed models of it.

    python tests/readers/folders.py FOLDER [type …]

writes `FOLDER/NAME/`, with the logits that transformers 5 has for it in `FOLDER/NAME.npy` and its input in `inputs.npy`.
Run it in the project's environment, then `read.py` in that of another reader.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from kinds import CAUSAL, CLASSIFICATION, DECODER, Kind
from zoo_models import EXCEPTIONS, tiny_model

from trimllm_hf import drop_layers
from trimllm_hf.layer_map import num_hidden_layers
from trimllm_hf.surgery.older_spellings import with_older_spellings

for gemma in ("gemma2", "gemma3_text"):  # as published, and as CTranslate2 takes for granted
    EXCEPTIONS[gemma] = {**EXCEPTIONS.get(gemma, {}), "query_pre_attn_scalar": 8}
EXCEPTIONS["qwen3_moe"] = {**EXCEPTIONS["qwen3_moe"], "head_dim": 8}  # as published, and as mlx-lm asks for
EXCEPTIONS["phimoe"] = {**EXCEPTIONS.get("phimoe", {}), "attention_bias": True, "lm_head_bias": True}
EXCEPTIONS["recurrent_gemma"] = {**EXCEPTIONS.get("recurrent_gemma", {}), "num_key_value_heads": 1}
TASKS = {"causal": CAUSAL, "classification": CLASSIFICATION, "seq2seq": DECODER}
OLDER_WORDS = {"rope_theta", "global_rope_theta", "rotary_emb_base"}
LEGACY_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
LEGACY = ("granitemoehybrid", "bamba", "zamba", "zamba2", "jamba", "falcon_h1")  # whose files say "mamba"


def write(folder: Path, model: torch.nn.Module, kind: Kind) -> None:
    """One model and its logits, with a tokenizer, which CTranslate2 asks for."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>"]})
    tokenizer.save_pretrained(folder)
    if not hasattr(model.config, "trim"):  # as its authors published it
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    inputs = kind.inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    np.save(f"{folder}.npy", logits.float().numpy())
    np.savez(f"{folder}.inputs.npz", **{name: value.numpy() for name, value in inputs.items()})


def as_published(folder: Path) -> None:
    """Spell the config of a base as its authors did: in older words, without the new ones."""
    config = transformers.AutoConfig.from_pretrained(folder)
    plain = with_older_spellings(json.loads((folder / "config.json").read_text()), config)
    (folder / "config.json").write_text(json.dumps(_without_new_words(plain, config.model_type), indent=1))


def _without_new_words(plain: dict, model_type: str) -> dict:
    found = {}
    if "moe" in model_type and "num_local_experts" in plain and model_type.startswith("qwen3"):
        plain = {**plain, "num_experts": plain["num_local_experts"]}
    for name, value in plain.items():
        if name == "dtype" or (name == "rope_parameters" and OLDER_WORDS & plain.keys()):
            continue
        if name == "layer_types" and model_type in LEGACY:
            value = [LEGACY_KINDS.get(kind, kind) for kind in value]
        found[name] = _without_new_words(value, model_type) if isinstance(value, dict) and name != "trim" else value
    return found


def write_type(root: Path, task: str, model_type: str, drops: Iterable[tuple[int, ...]]) -> Iterator[str]:
    """A base and what is left of it after some drops; nothing for a type of which no tiny model can be made."""
    kind = TASKS[task]
    name = f"{task}-{model_type}"
    try:
        base = tiny_model(kind.auto_class, model_type)
        write(root / f"{name}-base", base, kind)
        as_published(root / f"{name}-base")
    except Exception as error:
        print(f"{name}: not built: {str(error)[:100]}")
        return
    depth = num_hidden_layers(base.config, kind.part)
    for layers in drops:
        model = copy.deepcopy(base)
        model.config._name_or_path = str(root / f"{name}-base")  # as if it had been loaded from there
        try:
            drop_layers(model, [layer % depth for layer in layers], part=kind.part)
        except ValueError as error:
            print(f"{name}-{'.'.join(map(str, layers))}: refused: {str(error)[:100]}")
            continue
        folder = root / f"{name}-without-{'-'.join(str(layer % depth) for layer in layers)}"
        try:
            write(folder, model, kind)
        except Exception as error:
            print(f"{folder.name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        yield folder.name


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root, types = Path(sys.argv[1]), sys.argv[2:]
    root.mkdir(parents=True, exist_ok=True)
    for task, kind in TASKS.items():
        for model_type in kind.types():
            if not types or model_type in types:
                list(write_type(root, task, model_type, [(1, 4), (2,), (3,), (0, 1, 2)]))
