"""The tiny models that PEFT's own tests ask the Hub for, in three caches without network.

    python tests/peers/peft_models.py FOLDER

writes `FOLDER/untrimmed`, models of the depth that the tests expect, made without this package; `FOLDER/in_memory`, deeper
ones with the same layers among theirs, whose config names those to drop once they are loaded; and `FOLDER/reloaded`, what
`drop_layers` leaves of these, saved. The logits of all three are the same, which is checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trimllm_hf import drop_layers

DROPPED = (1, 3)
MARK = "drop_once_loaded"  # in a config.json of `in_memory`
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"

COMMON = {
    "vocab_size": 1100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.05,
}  # fmt: skip
WITHOUT_GROUPS = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
ENCODER = {**WITHOUT_GROUPS, "intermediate_size": 37}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 1100, "n_embd": 32, "n_head": 4, "n_positions": 256, **IDS}
OPT = {
    **{name: value for name, value in WITHOUT_GROUPS.items() if name != "intermediate_size"},
    "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1, **IDS,
}  # fmt: skip
OPT_WIDE = {**OPT, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
LLAMA = {**COMMON, "hidden_size": 16, "num_key_value_heads": 4, "pad_token_id": 0}
QWEN = {**COMMON, "tie_word_embeddings": True, **IDS}
MOE = {**QWEN, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
T5 = {"vocab_size": 1100, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "vocab_size": 1100, "d_model": 16, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
GEMMA4 = {
    **COMMON, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 16, "sliding_window": 64,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 1100, "hidden_size_per_layer_input": 8, **IDS,
}  # fmt: skip
LLAMA4 = {
    **LLAMA, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32, "intermediate_size_mlp": 32,
    "num_local_experts": 4, "interleave_moe_layer_step": 1, "attention_chunk_size": 64,
}  # fmt: skip
GPT_OSS = {
    **COMMON, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
    "pad_token_id": 0, "rope_scaling": None,
}  # fmt: skip
WHISPER = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 30, "max_target_positions": 60,
    "decoder_start_token_id": 1, "pad_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None, **IDS,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model under some names of the Hub.

    Attributes:
        model_class: Its class.
        layers: How many the tests expect.
        settings: Of its config.
        names: On the Hub.
        by_layer: Settings with an entry for each layer of the deeper model.
        depth: The field of its depth.
        other_depth: The field of an encoder's depth, which stays as the tests expect.
    """

    model_class: str
    layers: int
    settings: Mapping[str, Any]
    names: str
    by_layer: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    depth: str = "num_hidden_layers"
    other_depth: str = ""

    @property
    def part(self) -> str | None:
        return "decoder" if self.other_depth else None

    def make(self, kept: Sequence[int]) -> Any:
        """A model without trained weights of some of the deeper model's layers."""
        settings = {**self.settings, self.depth: len(kept)}
        settings |= {name: [values[layer] for layer in kept] for name, values in self.by_layer.items()}
        if self.other_depth:
            settings[self.other_depth] = self.layers
        model_class = getattr(transformers, self.model_class)
        return model_class(model_class.config_class(**settings)).eval()


MODELS = [
    Tiny(
        "OPTForCausalLM", 5, OPT,
        "peft-internal-testing/tiny-random-OPTForCausalLM hf-internal-testing/tiny-random-OPTForCausalLM "
        "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab",
    ),
    Tiny("OPTForCausalLM", 12, OPT_WIDE, "peft-internal-testing/opt-125m facebook/opt-125m"),
    Tiny(
        "GPT2LMHeadModel", 5, GPT2,
        "peft-internal-testing/tiny-random-GPT2LMHeadModel hf-internal-testing/tiny-random-gpt2 "
        "peft-internal-testing/tiny-random-gpt2 gpt2 openai-community/gpt2",
        depth="n_layer",
    ),
    Tiny(
        "GPTJForCausalLM", 5, {**GPT2, "rotary_dim": 4}, "peft-internal-testing/tiny-random-GPTJForCausalLM",
        depth="n_layer",
    ),
    Tiny(
        "LlamaForCausalLM", 2, LLAMA,
        "trl-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/tiny-random-LlamaForCausalLM "
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
    ),
    Tiny(
        "LlamaForSequenceClassification", 2, {**LLAMA, "num_key_value_heads": 2},
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    ),
    Tiny(
        "Qwen2ForCausalLM", 2, QWEN,
        "peft-internal-testing/tiny-dummy-qwen2 trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
    ),
    Tiny("Qwen3ForCausalLM", 2, {**QWEN, "head_dim": 8}, "trl-internal-testing/tiny-Qwen3ForCausalLM"),
    Tiny("MistralForCausalLM", 2, COMMON, "hf-internal-testing/tiny-random-MistralForCausalLM"),
    Tiny(
        "Gemma3ForCausalLM", 3, {**COMMON, "head_dim": 8, "sliding_window": 64},
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
        {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]},
    ),
    Tiny(
        "Gemma4ForCausalLM", 5, GEMMA4, "peft-internal-testing/tiny-random-gemma4-E2B",
        {"layer_types": [SLIDING, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]},
    ),
    Tiny(
        "BloomForCausalLM", 5, {"vocab_size": 1100, "hidden_size": 32, "n_head": 4, **IDS},
        "peft-internal-testing/tiny-random-BloomForCausalLM", depth="n_layer",
    ),
    Tiny("GPTNeoXForCausalLM", 5, {**WITHOUT_GROUPS, **IDS}, "peft-internal-testing/tiny-random-GPTNeoXForCausalLM"),
    Tiny(
        "BertModel", 5, ENCODER, "peft-internal-testing/tiny-random-BertModel hf-internal-testing/tiny-random-BertModel",
    ),
    Tiny("BertForMaskedLM", 5, ENCODER, "bert-base-uncased"),
    Tiny(
        "BertForSequenceClassification", 5, ENCODER, "peft-internal-testing/tiny-random-BertForSequenceClassification",
    ),
    Tiny(
        "RobertaModel", 5, {**ENCODER, "max_position_embeddings": 258, "type_vocab_size": 1, "pad_token_id": 1},
        "peft-internal-testing/tiny-random-RobertaModel",
    ),
    Tiny(
        "RobertaForSequenceClassification", 5,
        {**ENCODER, "max_position_embeddings": 258, "type_vocab_size": 1, "pad_token_id": 1},
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
    ),
    Tiny(
        "DebertaModel", 5, {**ENCODER, "type_vocab_size": 16, "relative_attention": False, "position_biased_input": True},
        "peft-internal-testing/tiny-random-DebertaModel",
    ),
    Tiny("DebertaV2Model", 5, {**ENCODER, "type_vocab_size": 16}, "peft-internal-testing/tiny-random-DebertaV2Model"),
    Tiny(
        "T5ForConditionalGeneration", 5, T5,
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated "
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration peft-internal-testing/tiny-random-t5 "
        "hf-internal-testing/tiny-random-T5ForConditionalGeneration",
        depth="num_decoder_layers", other_depth="num_layers",
    ),
    Tiny(
        "T5ForConditionalGeneration", 3, {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "google/flan-t5-small google/flan-t5-base", depth="num_decoder_layers", other_depth="num_layers",
    ),
    Tiny(
        "BartForConditionalGeneration", 2, BART,
        "peft-internal-testing/tiny-random-BartForConditionalGeneration "
        "hf-internal-testing/tiny-random-BartForConditionalGeneration",
        depth="decoder_layers", other_depth="encoder_layers",
    ),
    Tiny(
        "WhisperForConditionalGeneration", 2, WHISPER, "hf-internal-testing/tiny-random-WhisperForConditionalGeneration",
        depth="decoder_layers", other_depth="encoder_layers",
    ),
    Tiny("MixtralForCausalLM", 2, {**COMMON, "num_local_experts": 4}, "hf-internal-testing/Mixtral-tiny"),
    Tiny("Qwen3MoeForCausalLM", 2, MOE, "hf-internal-testing/tiny-qwen3-moe trl-internal-testing/tiny-Qwen3MoeForCausalLM"),
    Tiny(
        "GptOssForCausalLM", 2, GPT_OSS, "trl-internal-testing/tiny-GptOssForCausalLM",
        {"layer_types": [SLIDING, SLIDING, FULL, FULL]},
    ),
    Tiny(
        "Llama4ForCausalLM", 2, LLAMA4, "trl-internal-testing/tiny-Llama4ForCausalLM",
        {"layer_types": [CHUNKED, CHUNKED, FULL, CHUNKED], "no_rope_layers": [1, 1, 0, 1]},
    ),
]  # fmt: skip

# Adapters of the Hub: made on the untrimmed models, and the same files in each cache.
OPT_NAME = "hf-internal-testing/tiny-random-OPTForCausalLM"
ADAPTERS = {
    "tiny-OPTForCausalLM-lora": ("AutoModelForCausalLM", OPT_NAME, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "tiny_OPTForFeatureExtraction-lora": ("AutoModel", OPT_NAME, "FEATURE_EXTRACTION", ["q_proj", "v_proj"]),
    "tiny_OPTForQuestionAnswering-lora": ("AutoModelForQuestionAnswering", OPT_NAME, "QUESTION_ANS", ["q_proj", "v_proj"]),
    "tiny_OPTForSequenceClassification-lora": (
        "AutoModelForSequenceClassification", OPT_NAME, "SEQ_CLS", ["q_proj", "v_proj"],
    ),
    "tiny_GPT2ForTokenClassification-lora": (
        "AutoModelForTokenClassification", "hf-internal-testing/tiny-random-gpt2", "TOKEN_CLS", ["c_attn"],
    ),
    "tiny_T5ForSeq2SeqLM-lora": (
        "AutoModelForSeq2SeqLM", "hf-internal-testing/tiny-random-T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "v"],
    ),
    "tiny_WhisperForConditionalGeneration-lora": (
        "AutoModelForSpeechSeq2Seq", "hf-internal-testing/tiny-random-WhisperForConditionalGeneration", None,
        ["q_proj", "v_proj"],
    ),
    "gpt2-lora-random": ("AutoModelForCausalLM", "gpt2", "CAUSAL_LM", ["c_attn"]),
    "opt-125m-dummy-lora": ("AutoModelForCausalLM", "peft-internal-testing/opt-125m", "CAUSAL_LM", ["q_proj", "v_proj"]),
}  # fmt: skip


def tokenizer() -> Any:
    """A byte-level tokenizer of 1,000 pieces, of what this file says."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    made.train([__file__], trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def copy_layers(deep: Any, model: Any, kept: Sequence[int], part: str | None) -> None:
    """Give a model the weights of a deeper one's layers, by their names; packed tensors lose the dropped layers' parts."""
    found, held = {}, deep.state_dict()
    for name, value in model.state_dict().items():
        numbered = re.search(r"(?:^|\.)(?:layers|h|layer|block)\.(\d+)\.", name)
        of_part = part is None or part == name.removeprefix("model.").partition(".")[0]
        if numbered and of_part:
            start, end = numbered.span(1)
            found[name] = held[name[:start] + str(kept[int(numbered[1])]) + name[end:]]
        elif held[name].shape == value.shape:
            found[name] = held[name]
        else:
            dimension = next(i for i, (a, b) in enumerate(zip(held[name].shape, value.shape, strict=True)) if a != b)
            parts = held[name].chunk(len(kept) + len(DROPPED), dimension)
            found[name] = torch.cat([parts[layer] for layer in kept], dimension)
    model.load_state_dict(found)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])
    inputs = {"input_ids": ids}
    if model.config.model_type == "whisper":
        inputs = {"input_features": torch.ones(1, 80, 60), "decoder_input_ids": ids}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def snapshot(cache: Path, name: str) -> Path:
    """An empty snapshot of a repository in a cache of the Hub."""
    root = cache / f"models--{name.replace('/', '--')}"
    shutil.rmtree(root, ignore_errors=True)
    commit = hashlib.sha1(name.encode()).hexdigest()
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def write(root: Path, tiny: Tiny, words: Any) -> None:
    """One model, under all its names, in each cache.

    Raises:
        AssertionError: If the three differ.
    """
    torch.manual_seed(0)
    depth = tiny.layers + len(DROPPED)
    kept = [layer for layer in range(depth) if layer not in DROPPED]
    deep, untrimmed = tiny.make(range(depth)), tiny.make(kept)
    copy_layers(deep, untrimmed, kept, tiny.part)
    expected = logits(untrimmed)
    for name in tiny.names.split():
        deep.save_pretrained(at := snapshot(root / "in_memory", name))
        trimmed = type(deep).from_pretrained(at)
        drop_layers(trimmed, DROPPED, part=tiny.part)
        config = json.loads((at / "config.json").read_text())
        (at / "config.json").write_text(json.dumps({**config, MARK: {"layers": DROPPED, "part": tiny.part}}))
        trimmed.save_pretrained(folder := snapshot(root / "reloaded", name))
        untrimmed.save_pretrained(plain := snapshot(root / "untrimmed", name))
        for each in (at, folder, plain):
            words.save_pretrained(each)
        for found in (trimmed, type(deep).from_pretrained(folder)):
            torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-6)


def write_adapters(root: Path) -> None:
    import peft

    for name, (auto, base, task, targets) in ADAPTERS.items():
        torch.manual_seed(0)
        cached = root / "untrimmed" / f"models--{base.replace('/', '--')}"
        model = getattr(transformers, auto).from_pretrained(next((cached / "snapshots").iterdir()))
        config = peft.LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        model.peft_config["default"].base_model_name_or_path = base
        for mode in ("untrimmed", "in_memory", "reloaded"):
            model.save_pretrained(snapshot(root / mode, f"peft-internal-testing/{name}"))


def main(root: Path, only: Iterable[str] = ()) -> None:
    transformers.logging.set_verbosity_error()
    words = tokenizer()
    for tiny in MODELS:
        if not only or any(part in tiny.names for part in only):
            write(root, tiny, words)
            print(tiny.model_class, tiny.names, flush=True)
    if not only:
        write_adapters(root)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]), sys.argv[2:])
