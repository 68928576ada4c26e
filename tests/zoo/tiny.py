"""Tiny configs of any model type: one rule that shrinks what a field's name says, and a short table of exceptions."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

DEPTH = 6
VOCABULARY = 99
WIDTH = 32

# Of the first pattern that fits a field's whole name, the value. A whole number takes it; lists are cut, see _shrunk.
RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_per_layer_input)?|vocab_size_.*|n_tokens|n_words", VOCABULARY),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|mtp_num_layers", 0),
    (r"(num_)?encoder_layers|decoder_layers|num_decoder_layers|n_layers?|num_layers|num_hidden_layers|.*_num_hidden_layers", DEPTH),
    (r"num_kv_shared_layers", 2),
    (r"(global_|swa_)?num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads|.*_num_key_value_heads", 2),
    (r"(.*_)?num_heads|(.*_)?n_heads?|(.*_)?num_attention_heads|encoder_attention_heads|decoder_attention_heads|.*_n_heads", 4),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts|.*num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|experts_top_k|num_selected_experts|moe_k|top_k_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank|.*_lora_rank|time_step_rank|dt_rank", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_dim|kv_channels|attention_head_dim|index_head_dim|global_head_dim|head_size|d_kv", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|.*max_position_embeddings|max_source_positions|max_target_positions", 128),
    (r"(.*_)?sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size|chunk_size|mamba_chunk_size", 16),
    (r"(.*_)?intermediate_size|intermediate_dim|ffn_dim|(en|de)coder_ffn_dim|d_ff|n_inner|ffn_hidden_size|inner_dim|.*ffn.*_size|.*_intermediate_size|.*intermediate_size.*|dim_ff", 64),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|dim|dim_model|lru_width|word_embed_proj_dim|.*attention_dim|rotary_dim_total|attention_hidden_size|model_dim", WIDTH),
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
    for key, spec in config_class.sub_configs_defaults.items():
        sub_class = spec.config_class if issubclass_safe(spec.config_class) else CONFIG_MAPPING.get(spec.model_type)
        if sub_class is not None:
            values[key] = {"model_type": sub_class.model_type, **tiny_values(sub_class)}
    values.update(EXCEPTIONS.get(config_class.model_type, {}))
    return values


def issubclass_safe(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedConfig)


EXCEPTIONS: dict[str, dict[str, Any]] = {}


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
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(copy.deepcopy(config)).parameters())
    if size > 4_000_000:
        raise TooBig(f"{size:,} parameters by the shrinking rule")
    torch.manual_seed(seed)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
