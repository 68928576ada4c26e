"""What TRL's own tests ask the Hub for, made without network: tiny models in a cache of the Hub, and the data sets.

    python tests/peers/trl_models.py FOLDER TRL

writes models of four layers to `FOLDER/cache`, and to `FOLDER/data` the sets that `scripts/` in the source of TRL makes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft_models import BART, COMMON, GPT_OSS, IDS, MOE, QWEN, T5, WITHOUT_GROUPS, snapshot, tokenizer

LAYERS = 4
REWARD = {"num_labels": 1, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", QWEN),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**QWEN, "head_dim": 8}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", MOE),
    "tiny-GptOssForCausalLM": ("GptOssForCausalLM", GPT_OSS),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {**WITHOUT_GROUPS, **IDS}),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", {**COMMON, **IDS}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {**QWEN, **REWARD}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {**COMMON, **REWARD}),
    "tiny-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "tiny-BartModel": ("BartModel", BART),
}
DEPTHS = {"T5": ("num_layers", "num_decoder_layers"), "Ba": ("encoder_layers", "decoder_layers")}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_models(cache: Path) -> None:
    words = tokenizer()
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    words.chat_template = CHAT
    for name, (class_name, settings) in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        depth = dict.fromkeys(DEPTHS.get(class_name[:2], ("num_hidden_layers",)), LAYERS)
        folder = snapshot(cache, f"trl-internal-testing/{name}")
        model_class(model_class.config_class(**settings, **depth)).save_pretrained(folder)
        words.save_pretrained(folder)


def write_data(data: Path, source: Path) -> None:
    """Each set as the script that publishes it makes it."""
    import datasets

    def save(self: Any, repo_id: str, config_name: str = "default", **kwargs: Any) -> None:
        self.save_to_disk(data / repo_id.rpartition("/")[2] / config_name)

    datasets.DatasetDict.push_to_hub = save
    sys.path.insert(0, str(source / "scripts"))
    import generate_zen_dataset

    generate_zen_dataset.main(0.1, True, "trl-internal-testing/zen")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_models(Path(sys.argv[1]) / "cache")
    write_data(Path(sys.argv[1]) / "data", Path(sys.argv[2]))
