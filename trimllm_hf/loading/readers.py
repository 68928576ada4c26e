"""Which readers load a checkpoint correctly: a verdict for each, from what it derives from the config and what was tried.

A reader that takes the kind of each layer from the config's list reads any trimmed model of the types it supports. One that
derives kinds from a layer's number is right where the list is what it derives. Nothing is promised for untested types: the
types below are those whose bases and trimmed models were read by that reader with the logits of transformers 5, which
`tests/readers` repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from ..layer_map import LayerMap, part_config
from ..surgery.config_reader import ConfigReader
from ..surgery.layer_pattern import KINDS, periods, unlike_default
from ..utils import quantizer_of

RIGHT, WRONG, UNTRIED = "right", "not right", "not tried"


@dataclass(frozen=True)
class Verdict:
    """How one reader handles a checkpoint.

    Attributes:
        reader: Its name, with the version that was tried.
        verdict: "right", "not right", or "not tried".
        reason: Why.
    """

    reader: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Reader:
    """What a reader was tried on, by model type.

    Attributes:
        name: Its name, with the version that was tried.
        by_list: Types whose layers' kinds it takes from the config, where the config gives them.
        by_period: Types whose layers' kinds it derives from a layer's number and a period in the config.
        by_number: Types whose layers' kinds it derives from a layer's number alone.
        whole_period: Whether it needs at least one full period of layers.
        needs_kinds: For these types, a kind of layer without which it cannot load the model.
        heads: Whether it has models with heads other than a language model's.
        by_head_width: Types whose attention it scales by the head dimension, whatever the config says.
        by_depth: For these types, the depth at which it assumes a model size whose attention is scaled by the hidden size
            divided by the number of heads.
        one_pass: Types that it reads correctly in one pass over a text, but not when generating beyond the sliding window.
    """

    name: str
    by_list: frozenset[str] = frozenset()
    by_period: frozenset[str] = frozenset()
    by_number: frozenset[str] = frozenset()
    whole_period: bool = False
    needs_kinds: dict[str, str] = field(default_factory=dict)
    heads: bool = False
    by_head_width: frozenset[str] = frozenset()
    by_depth: dict[str, int] = field(default_factory=dict)
    one_pass: frozenset[str] = frozenset()


TRANSFORMERS_5 = "transformers 5"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_TRANSFORMERS_4 = """
    apertus arcee aria_text bamba bart bert bert-generation big_bird biogpt bitnet blenderbot blenderbot-small bloom
    camembert canine codegen cohere cohere2 convbert ctrl data2vec-text deberta deberta-v2 deepseek_v2 deepseek_v3
    distilbert dots1 electra emu3_text_model encoder-decoder ernie ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1
    falcon_mamba flex_olmo fnet gemma gemma2 gemma3_text git glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe ibert jetmoe layoutlm led lfm2 llama llama4_text longformer longt5 luke m2m_100 mamba marian
    markuplm mbart megatron-bert minimax ministral mistral mixtral mobilebert moshi mpnet mpt mra mvp nemotron
    nystromformer olmo olmo2 olmo3 olmoe openai-gpt opt pegasus pegasus_x persimmon phi phi3 phi4_multimodal phimoe
    plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_next recurrent_gemma reformer rembert roberta roberta-prelayernorm
    roc_bert roformer rwkv seamless_m4t seamless_m4t_v2 seed_oss smollm3 squeezebert stablelm starcoder2
    switch_transformers t5 t5gemma tapas trocr umt5 vaultgemma whisper xglm xlm-roberta xlm-roberta-xl xlnet xmod
    yoso
"""
_MLX = """
    afmoe cohere dbrx deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe falcon_mamba gemma gemma2 glm4 gptj
    granite granitemoe helium hunyuan_v1_dense llama mamba mistral mixtral nemotron olmo2 olmo3 olmoe phi phi3 phimoe
    qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma seed_oss smollm3 stablelm starcoder2
"""
READERS = (
    Reader("transformers 4.57", by_list=frozenset(_TRANSFORMERS_4.split()), by_period=frozenset({"modernbert"}), heads=True),
    Reader(
        "llama.cpp b11549",
        by_list=frozenset({"llama", "mistral", "qwen2", "qwen3"}),
        by_number=frozenset({"gemma2", "gemma3_text"}),
        by_head_width=frozenset({"gemma2", "gemma3_text"}),
        by_depth={"gemma2": 46, "gemma3_text": 62},
    ),
    Reader(
        "mlx-lm 0.32",
        by_list=frozenset(_MLX.split()),
        by_period=frozenset({"cohere2", "gemma3_text", "qwen3_next"}),
        whole_period=True,
        needs_kinds={"afmoe": "full_attention"},
    ),
    Reader(
        "CTranslate2 4.8",
        by_list=frozenset({"gemma3_text", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}),
        by_head_width=frozenset({"gemma3_text"}),
        one_pass=frozenset({"gemma3_text"}),
    ),
)


def readers_of(config: PreTrainedConfig) -> tuple[Verdict, ...]:
    """For each reader, whether it reads a checkpoint with this config as the same model as transformers 5 does.

    Args:
        config: The config of a model, trimmed or not.

    Raises:
        ValueError: If its map is damaged.
    """
    layer_map = LayerMap.from_config(config)
    if lacking := unknown_to_stock(layer_map, getattr(config, "slicing", None) is not None):
        of_stock = Verdict(TRANSFORMERS_5, WRONG, f"it does not know {lacking}, and says so")
        return (of_stock, *(Verdict(reader.name, WRONG, of_stock.reason) for reader in READERS))
    holder = part_config(config, layer_map.part)
    quantizer = quantizer_of(config)
    found = [Verdict(TRANSFORMERS_5, RIGHT, "the layers that stay were compared when they were chosen")]
    if quantizer is not None:
        return (
            *found,
            *(Verdict(each.name, UNTRIED, f"not tried with weights quantized by {quantizer}") for each in READERS),
        )
    return (*found, *(_verdict(reader, config, holder) for reader in READERS))


def unknown_to_stock(layer_map: LayerMap, sliced: bool) -> str:
    """What a model consists of that no reader knows without this package, in words; an empty string for whole layers."""
    missing = "" if layer_map.has_all_sublayers else "blocks that lack a sublayer"
    return " and ".join(filter(None, (missing, "layers of different widths" * sliced)))


def _verdict(reader: Reader, config: PreTrainedConfig, holder: PreTrainedConfig) -> Verdict:
    model_type = config.model_type
    named = (config.architectures or [""])[0]
    if not reader.heads and named and not named.endswith(_LANGUAGE_MODELS):
        return Verdict(reader.name, UNTRIED, f"not tried with {named}")
    if model_type in reader.by_head_width and (scaled := _other_scale(reader, holder)):
        return Verdict(reader.name, WRONG, scaled)
    needed = reader.needs_kinds.get(model_type)
    if needed is not None and needed not in (getattr(holder, "layer_types", None) or [needed]):
        return Verdict(reader.name, WRONG, f"it cannot load this type without a layer of {needed}")
    if model_type in reader.by_list:
        but = "; in one pass: it generates wrongly beyond the sliding window, trimmed or not"
        return Verdict(
            reader.name, RIGHT, f"it reads from the config what each layer is{but * (model_type in reader.one_pass)}"
        )
    if model_type in reader.by_period:
        said, wrong = "a layer's number and a period in the config", _without_period(holder, reader.whole_period)
    elif model_type in reader.by_number:
        said, wrong = "a layer's number", list(unlike_default(holder))
    else:
        return Verdict(reader.name, UNTRIED, f"not tried with {model_type}")
    if wrong:
        return Verdict(reader.name, WRONG, f"it works out what each layer is from {said}, which does not give {wrong[0]}")
    return Verdict(reader.name, RIGHT, f"it works out what each layer is from {said}, which gives what the config lists")


def _other_scale(reader: Reader, config: PreTrainedConfig) -> str:
    """What a reader scales attention by, if that differs from the config; else an empty string."""
    depth = reader.by_depth.get(config.model_type)
    by_heads = depth is not None and config.num_hidden_layers == depth
    width = config.hidden_size // config.num_attention_heads if by_heads else getattr(config, "head_dim", None)
    if getattr(config, "query_pre_attn_scalar", None) in (None, width):
        return ""
    otherwise = "trimmed or not" if depth is None else f"and only at {depth} layers by that of the model over its heads"
    return f"it scales attention by the width of a head, {otherwise}"


def _without_period(config: PreTrainedConfig, whole: bool) -> list[str]:
    """The lists of kinds that no period in the config can express, or no period of at most the depth if `whole`."""
    reader = ConfigReader(config)
    listed = {name: len(value) for name in KINDS if isinstance(value := (reader.now or {}).get(name), list)}
    found = list(periods(reader).values())
    depth = max(listed.values(), default=0)
    right = found and all(period is not None and not (whole and period > depth) for period in found)
    return [] if right or not listed else list(listed)
