"""Tiny configs of any model type: one rule that shrinks what a field's name says, and a short table of exceptions."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

DEPTH = 6
VOCABULARY = 99
WIDTH = 32

# Of the first pattern that fits a field's whole name, the value. A whole number takes it; lists are cut, see _shrunk.
RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_per_layer_input)?|vocab_size_.*|n_tokens|n_words", VOCABULARY),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|mtp_num_layers", 0),
    (
        r"(num_)?encoder_layers|decoder_layers|num_decoder_layers|n_layers?|num_layers|num_hidden_layers|.*_num_hidden_layers",
        DEPTH,
    ),
    (r"num_kv_shared_layers", 2),
    (
        r"(global_|swa_)?num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads|.*_num_key_value_heads",
        2,
    ),
    (
        r"(.*_)?num_heads|(.*_)?n_heads?|(.*_)?num_attention_heads|encoder_attention_heads|decoder_attention_heads|.*_n_heads",
        4,
    ),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts|.*num_experts", 4),
    (
        r"num_experts_per_tok(en)?|moe_top_?k|experts_top_k|num_selected_experts|moe_k|top_k_experts|num_experts_per_token",
        2,
    ),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank|.*_lora_rank|time_step_rank|dt_rank", 8),
    (r"rotary_dim", 4),
    (r"linear_(key|value)_head_dim", 8),
    (
        r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_dim|kv_channels|attention_head_dim|index_head_dim|global_head_dim|head_size|d_kv",
        8,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|.*max_position_embeddings|max_source_positions|max_target_positions",
        128,
    ),
    (
        r"(.*_)?sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size|chunk_size|mamba_chunk_size",
        16,
    ),
    (
        r"(.*_)?intermediate_size|intermediate_dim|ffn_dim|(en|de)coder_ffn_dim|d_ff|n_inner|ffn_hidden_size|inner_dim|.*ffn.*_size|.*_intermediate_size|.*intermediate_size.*|dim_ff",
        64,
    ),
    (r"hidden_size_per_layer_input", 8),
    (
        r"(.*_)?hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|dim|dim_model|lru_width|word_embed_proj_dim|.*attention_dim|rotary_dim_total|attention_hidden_size|model_dim",
        WIDTH,
    ),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_dim", 8),
    (r"laurel_rank", 8),
]


def _by_name(name: str) -> int | None:
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """A config's fields with their default values."""
    found = {}
    for base in reversed(config_class.__mro__):
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            found[name] = field.default
    if "__init__" in vars(config_class) and not found:
        found = {n: p.default for n, p in inspect.signature(config_class.__init__).parameters.items()}
    return found


def tiny_values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments for a tiny config of that class."""
    values: dict[str, Any] = {}
    reverse = {own: common for common, own in config_class.attribute_map.items()}
    for name, default in _defaults(config_class).items():
        if isinstance(default, bool) or name in ("id2label", "label2id"):
            continue
        small = _by_name(name)
        if small is None and name in reverse:
            small = _by_name(reverse[name])
        if isinstance(default, int) and small is not None:
            values[name] = small if small == DEPTH or name == "head_dim" else min(small, default) if default > 0 else default
        elif name.endswith(("_token_id", "_token_index", "_id")) and isinstance(default, int) and default >= VOCABULARY:
            values[name] = VOCABULARY - 1 - len(values) % 7
        elif small is not None and name == "head_dim":
            values[name] = small
    defaults = getattr(config_class, "sub_configs_defaults", {})  # transformers 5.17 has none
    for key, sub_class in config_class.sub_configs.items():
        if not issubclass_safe(sub_class):
            named = getattr(defaults.get(key), "model_type", None)
            sub_class = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else None
        if sub_class is not None:
            values[key] = {"model_type": sub_class.model_type, **tiny_values(sub_class)}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)  # latent attention has a key for each head
    values.update(EXCEPTIONS.get(config_class.model_type, {}))
    return values


def issubclass_safe(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedConfig)


_HALF = ["sliding_attention", "full_attention"] * (DEPTH // 2)
_LINEAR = ["linear_attention", "linear_attention", "full_attention"] * (DEPTH // 3)
_SHARING = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# Types that are encoders unless they are told to be decoders.
ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip

# Where the rule cannot know: values that have to fit together, and defaults that leave out what the released models set.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [2, 5], **_MAMBA},
    "codegen": {"rotary_dim": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dory": {"n_input_layers": 2, "n_output_layers": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": None},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **_BERT},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True, **_BERT},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "gemma3n_text": {
        "layer_types": _SHARING,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * DEPTH,
    },
    "gemma4_text": {"layer_types": _SHARING, "num_kv_shared_layers": 2, "global_head_dim": 8},
    "gemma4_unified_text": {"layer_types": _SHARING, "global_head_dim": 8},
    "gpt_neo": {"num_layers": DEPTH, "attention_types": [[["global", "local"], DEPTH // 2]], "window_size": 16},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _LINEAR, "shared_intermediate_size": 64, **_MAMBA},
    "led": {"attention_window": [8] * DEPTH},
    "inkling2_text": {"n_layers_per_attn_res_block": 3},
    "inkling2_loop_text": {
        "num_hidden_layers": 9,
        "n_layers_per_attn_res_block": 3,
        "loop_layer_index_start": 3,
        "loop_layer_index_end": 6,
    },
    "deberta-v2": {"conv_kernel_size": 3},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "moshi": {"audio_vocab_size": 99},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "phi4_multimodal_audio": {"hidden_size": 32, "nemo_conv_channels": 32, "ext_pw_out_channel": 32, "num_blocks": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_embed_dim": 8,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 2,
        "hc_lowrank": 4,
    },
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_buckets": 4,
    },
    "siglip_vision_model": _SMALL_VISION,
    **{  # T5's cache is as long as its encoder is deep
        t5: {"num_decoder_layers": 4, "decoder_start_token_id": 0}
        for t5 in ("longt5", "mt5", "prophetnet", "switch_transformers", "t5", "umt5")
    },
    **{
        text: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
        for text in (
            "glm4v_moe_text",
            "glm4v_text",
            "glm_ocr_text",
            "glmga_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
        )
    },
    "xlstm": {"num_blocks": DEPTH, "num_heads": 4, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "num_attention_heads": 4,
        "n_mamba_heads": 8,
    },
}


class TooBig(Exception):
    """The shrinking rule did not make the model small."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A tiny config of a model type, by the rule and the table of exceptions."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**tiny_values(config_class))


def tiny_model(auto_class: Any, model_type: str, seed: int = 0) -> nn.Module:
    """A tiny random model in evaluation mode. Each parameter is moved off its initial value: no norm is the identity.

    Raises:
        TooBig: If it would have more than a few million parameters.
    """
    config = tiny_config(model_type)
    text_config = config.get_text_config(decoder=True)
    if auto_class is AutoModelForSequenceClassification and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = 0
    if auto_class is AutoModelForCausalLM and config.model_type in ENCODERS:
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(copy.deepcopy(config)).parameters())
    if size > 4_000_000:
        raise TooBig(f"{size:,} parameters by the shrinking rule")
    torch.manual_seed(seed)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:  # Marian's positions are computed, and not saved
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
