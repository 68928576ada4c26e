"""A trimmed model's config.json says all in the words of older readers too, and transformers 5 reads it as before."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import COMMON, tiny_model, tiny_texts, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from trimllm_hf import LayerMap, TrimCallback, TrimConfig, drop_layers, load_kept_layers, trim_like, write_kept_layers

# What transformers 4.57.6 writes for each of its types: `type().to_json_string()`, the names of rotary settings in it.
WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words_of_transformers_4_57.json").read_text())
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KEPT, DROPPED = [0, 2, 3, 5], [1, 4]


def file_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def at(plain: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        plain = plain[name]
    return plain


def as_published(folder: Path, **more: Any) -> None:
    """Spell a base's config as its authors did: in older words alone."""
    plain = file_of(folder)
    rope = plain.pop("rope_parameters")
    plain |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": plain.pop("dtype"), **more}
    if rope["rope_type"] != "default":
        plain["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(plain))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("model_type", sorted(WORDS.keys() & set(CONFIG_MAPPING)))
def test_a_trimmed_config_has_the_words_of_transformers_4(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    config.trim = {}
    config.save_pretrained(tmp_path)
    plain = file_of(tmp_path)
    for path in WORDS[model_type]:
        parent, _, name = path.rpartition(".")
        part = at(plain, parent) if parent else plain
        if "rope_parameters" not in part:
            assert name in part, "neither spelling is there"
            continue
        rope = part["rope_parameters"]
        whole = rope.get("full_attention", rope)
        if name in ("rope_theta", "global_rope_theta", "rotary_emb_base"):
            assert part[name] == whole["rope_theta"]
        elif name in ("rope_local_base_freq", "local_rope_theta"):
            assert part[name] == rope["sliding_attention"]["rope_theta"]
        elif name in ("partial_rotary_factor", "rotary_pct"):
            assert part.get(name) == whole.get("partial_rotary_factor")
        elif part[name] is None:
            assert whole["rope_type"] == "default"
        else:
            assert part[name].items() <= whole.items()
    again = AutoConfig.from_pretrained(tmp_path)
    assert same(again.to_dict(), before.to_dict())


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a config says all that another one says, but for what begins with an underscore."""
    return all(
        same(found[name], value) if isinstance(value, dict) and isinstance(found[name], dict) else found[name] == value
        for name, value in expected.items()
        if not str(name).startswith("_")
    )


def test_an_untrimmed_config_is_written_as_ever(tmp_path: Path) -> None:
    config = tiny_model().config
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == config.to_json_string()
    assert "rope_theta" not in file_of(tmp_path)


def base_at(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A base as its authors publish it."""
    tiny_model(family, rope_parameters=copy.deepcopy(LLAMA3)).save_pretrained(folder)
    as_published(folder, **more)
    return folder


def by_files(base: Path, out: Path) -> None:
    write_kept_layers(base, KEPT, out)


def saved(base: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    drop_layers(model, DROPPED)
    model.save_pretrained(out)


def of_kept_layers(base: Path, out: Path) -> None:
    load_kept_layers(base, KEPT).save_pretrained(out)


def copied(base: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    drop_layers(model, DROPPED)
    pickle.loads(pickle.dumps(copy.deepcopy(model))).save_pretrained(out)


def reloaded(base: Path, out: Path) -> None:
    write_kept_layers(base, [0, 2, 3, 4, 5], out.with_name("once"))
    again = AutoModelForCausalLM.from_pretrained(out.with_name("once"))
    drop_layers(again, [3])
    again.save_pretrained(out.with_name("twice"))
    AutoModelForCausalLM.from_pretrained(out.with_name("twice")).save_pretrained(out)


def by_a_trainer(base: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = TrainingArguments(
        output_dir=str(out.with_name("run")), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    config = TrimConfig(target_layers=4, drop_every="once", importance="last", repair="none")
    Trainer(model, arguments, train_dataset=tiny_texts(16), callbacks=[TrimCallback(config)]).train()
    (out.with_name("run") / "checkpoint-2").rename(out)


def trimmed_like_another(base: Path, out: Path) -> None:
    write_kept_layers(base, KEPT, out.with_name("like"))
    model = AutoModelForCausalLM.from_pretrained(base)
    trim_like(model, out.with_name("like"))
    model.save_pretrained(out)


@pytest.mark.parametrize(
    "way", [by_files, saved, of_kept_layers, copied, reloaded, by_a_trainer, trimmed_like_another], ids=lambda f: f.__name__
)
def test_each_way_to_a_trimmed_folder_keeps_the_spellings_of_the_base(way: Any, tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", mlx_lm_reads_this={"a": [1]}, use_sliding_window=False)
    spelled = file_of(base)
    way(base, tmp_path / "out")
    plain = file_of(tmp_path / "out")
    assert spelled.keys() <= plain.keys()
    assert {k: v for k, v in spelled.items() if plain[k] != v}.keys() <= {
        "num_hidden_layers",
        "transformers_version",
        "use_cache",
    }
    assert plain["num_hidden_layers"] == 4
    assert plain["rope_parameters"] == LLAMA3 and plain["dtype"] == plain["torch_dtype"] == "float32"
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.config.rope_parameters == LLAMA3
    if way is not by_a_trainer:
        expected = AutoModelForCausalLM.from_pretrained(base)
        drop_layers(expected, DROPPED)
        assert torch.equal(logits(got), logits(expected))


def test_a_model_without_sublayers_keeps_them_and_is_still_refused_by_stock_classes(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_at(tmp_path / "base"))
    drop_layers(model, [3, 8, 9], unit="sublayer")
    model.save_pretrained(tmp_path / "out")
    plain = file_of(tmp_path / "out")
    assert (plain["rope_theta"], plain["rope_scaling"]["factor"], plain["torch_dtype"]) == (500000.0, 8.0, "float32")
    assert not isinstance(plain["num_hidden_layers"], int)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    code = f"import transformers; transformers.LlamaForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "import trimllm_hf" in done.stderr


@pytest.mark.parametrize(
    ("family", "rope", "older"),
    [
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 20000.0, "rotary_pct": 0.5},
        ),
        (
            "qwen3",  # yarn without a trained length, which transformers 5 fills in and others take for a scale of 1
            {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0},
            {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
            {
                "rope_theta": 30000.0,
                "rope_local_base_freq": 700.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi",
            {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.25},
            {"rope_theta": 9.0, "partial_rotary_factor": 0.25, "rope_scaling": None},
        ),
    ],
)
def test_settings_other_than_the_defaults(family: str, rope: dict[str, Any], older: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family, rope_parameters=rope)
    drop_layers(model, [1])
    model.save_pretrained(tmp_path)
    plain = file_of(tmp_path)
    assert {name: plain[name] for name in older} == older
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    del plain["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize(
    ("kept", "period"),
    [([0, 1, 2, 3, 4, 5], 6), ([0, 5, 6, 11], 2), ([0, 2, 4, 5, 7, 9, 11], None), ([2, 4, 5, 6], 3), ([5, 6, 11], None)],
)
def test_a_period_of_kinds_is_right_or_left_out(kept: list[int], period: int | None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("gemma3_text", num_hidden_layers=12).save_pretrained(base)
    plain = file_of(base)
    del plain["layer_types"]
    (base / "config.json").write_text(json.dumps({**plain, "sliding_window_pattern": 6}))
    write_kept_layers(base, kept, tmp_path / "out")
    plain = file_of(tmp_path / "out")
    assert plain.get("sliding_window_pattern") == period
    expected = ["full_attention" if layer in (5, 11) else "sliding_attention" for layer in kept]
    assert plain["layer_types"] == expected
    if period:  # what transformers 4.57, mlx-lm and others make of it
        by_number = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(kept))]
        assert by_number == expected


def test_names_that_transformers_5_exchanged_keep_the_bases_words(tmp_path: Path) -> None:
    base = tmp_path / "base"
    kinds = ["mamba", "mamba", "attention"] * 2
    values = {"mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 64, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("granitemoehybrid", **COMMON, layer_types=kinds, num_local_experts=2, **values)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    as_published(base, layer_types=kinds)
    write_kept_layers(base, [0, 2, 3, 5], tmp_path / "out")
    assert file_of(tmp_path / "out")["layer_types"] == ["mamba", "attention", "mamba", "attention"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    drop_layers(model, [1, 4])
    assert torch.equal(logits(again), logits(model))


def test_another_name_of_a_field_that_the_base_has(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = AutoConfig.for_model("qwen3_moe", **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    plain = file_of(base)
    plain["num_experts"] = plain.pop("num_local_experts", 4)
    (base / "config.json").write_text(json.dumps(plain))
    saved(base, tmp_path / "out")
    assert file_of(tmp_path / "out")["num_experts"] == 4


def test_a_list_with_an_entry_a_layer_that_transformers_does_not_know_is_cut(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", kv_scales_of_layers=[0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    for way in (by_files, saved):
        way(base, tmp_path / way.__name__)
        assert file_of(tmp_path / way.__name__)["kv_scales_of_layers"] == [0.5, 2.5, 3.5, 5.5]


class OwnConfig(PreTrainedConfig):
    """As in code beside the weights: it knows no rope_parameters, and its own words are attributes."""

    model_type = "own_code"

    def __init__(self, rope_theta: float = 10000.0, num_hidden_layers: int = 4, **kwargs: Any) -> None:
        self.rope_theta = rope_theta
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


def test_a_config_of_code_of_its_own_is_left_in_its_words(tmp_path: Path) -> None:
    config = OwnConfig(rope_theta=7.0, dtype="bfloat16")
    config.trim = LayerMap(6, (0, 1, 2, 3)).to_dict()
    config.save_pretrained(tmp_path)
    plain = file_of(tmp_path)
    assert (plain["rope_theta"], plain["torch_dtype"], "rope_parameters" in plain) == (7.0, "bfloat16", False)


def test_a_base_that_is_gone_costs_nothing_but_its_own_words(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    drop_layers(model, DROPPED)
    (base / "config.json").unlink()
    save_file({"x": torch.zeros(1)}, base / "model.safetensors")
    model.save_pretrained(tmp_path / "out")
    assert file_of(tmp_path / "out")["rope_theta"] == 500000.0


@pytest.mark.parametrize("first", ["model", "tokenizer"])
def test_a_tokenizer_is_saved_in_words_of_transformers_4(first: str, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(tmp_path / "alone")
    model = tiny_model()
    drop_layers(model, [1])
    for each in sorted([model, tokenizer], key=lambda each: (each is tokenizer) == (first == "model")):
        each.save_pretrained(tmp_path / "both")
    plain = json.loads((tmp_path / "both" / "tokenizer_config.json").read_text())
    assert plain["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in plain
    assert plain["additional_special_tokens"] == ["<one>", "<two>"]
    tiny_model().save_pretrained(tmp_path / "alone")
    write_kept_layers(tmp_path / "alone", KEPT, tmp_path / "files")
    assert json.loads((tmp_path / "files" / "tokenizer_config.json").read_text()) == plain
    alone = json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())
    assert alone["tokenizer_class"] == "TokenizersBackend"  # of no trimmed model: as transformers writes it
    found = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("alone", "both", "files")]
    for other in found[1:]:
        assert found[0].get_vocab() == other.get_vocab()
        assert found[0].all_special_tokens == other.all_special_tokens
        assert found[0]("a b <two>")["input_ids"] == other("a b <two>")["input_ids"]
