"""The verdicts by reader, and the readers themselves where their environments are here (`make readers`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import COMMON, tiny_model, tiny_texts
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

from trimllm_hf import TrimConfig, TrimTrainer, drop_layers, write_card
from trimllm_hf.loading.readers import READERS, RIGHT, UNTRIED, WRONG, readers_of
from trimllm_hf.surgery.layer_pattern import unlike_default

HERE = Path(__file__).parent
# One folder with an environment for each: see the Makefile.
ENVIRONMENTS = Path(os.environ.get("TRIMLLM_READERS", HERE.parents[1] / ".venv-readers"))
IN_ENVIRONMENT = {"transformers": "transformers 4.57", "mlx": "mlx-lm 0.32", "ctranslate2": "CTranslate2 4.8"}


def verdicts(config: Any) -> dict[str, str]:
    return {each.reader: each.verdict for each in readers_of(config)}


def gemma(kept: list[int] | None = None) -> Any:
    model = tiny_model("gemma3_text", num_hidden_layers=12, query_pre_attn_scalar=8)
    if kept is not None:
        drop_layers(model, [layer for layer in range(12) if layer not in kept])
    return model.config


@pytest.mark.parametrize(
    ("kept", "llama_cpp", "mlx"),
    [
        (None, RIGHT, RIGHT),
        ([0, 1, 2, 3, 4, 5], RIGHT, RIGHT),
        ([0, 1, 2, 9, 10, 11], RIGHT, RIGHT),  # the kinds count, not which layers they are
        ([0, 2, 4, 5, 7, 9, 11], WRONG, WRONG),
        ([0, 5, 6, 11], WRONG, RIGHT),  # a period of 2, which the config says
        ([5, 6, 11], WRONG, WRONG),
        ([0, 1, 2, 3, 4, 5, 6], RIGHT, RIGHT),
    ],
)
def test_who_works_kinds_out_from_a_number_is_right_where_the_pattern_is_left(
    kept: list[int] | None, llama_cpp: str, mlx: str
) -> None:
    found = verdicts(gemma(kept))
    assert (found["llama.cpp b11549"], found["mlx-lm 0.32"]) == (llama_cpp, mlx)
    assert found["transformers 5"] == found["transformers 4.57"] == found["CTranslate2 4.8"] == RIGHT


def test_a_model_without_kinds_is_right_where_it_was_tried() -> None:
    model = tiny_model()
    drop_layers(model, [1, 4])
    assert set(verdicts(model.config).values()) == {RIGHT}
    assert verdicts(tiny_model("opt").config)["llama.cpp b11549"] == UNTRIED


@pytest.mark.parametrize(
    ("model_type", "kinds", "mlx"),
    [
        ("qwen3_next", "LLFL", RIGHT),  # a period of 3
        ("qwen3_next", "LFLFL", RIGHT),
        ("qwen3_next", "FLL", WRONG),
        ("qwen3_next", "LLFF", WRONG),
        ("afmoe", "FSS", RIGHT),
        ("afmoe", "F", RIGHT),
        ("afmoe", "SSS", WRONG),
    ],
)
def test_what_mlx_makes_of_kinds(model_type: str, kinds: str, mlx: str) -> None:
    words = {"L": "linear_attention", "S": "sliding_attention", "F": "full_attention"}
    layer_types = [words[kind] for kind in kinds]
    config = AutoConfig.for_model(model_type, num_hidden_layers=len(kinds), layer_types=layer_types)
    assert verdicts(config)["mlx-lm 0.32"] == mlx


def test_who_scales_attention_by_the_width_of_a_head_is_right_where_the_config_says_so() -> None:
    assert verdicts(tiny_model("gemma3_text", query_pre_attn_scalar=4).config)["CTranslate2 4.8"] == WRONG


def test_other_heads_are_not_tried_where_only_language_models_were() -> None:
    config = tiny_model().config
    config.architectures = ["LlamaForSequenceClassification"]
    found = verdicts(config)
    assert found["mlx-lm 0.32"] == found["llama.cpp b11549"] == found["CTranslate2 4.8"] == UNTRIED
    assert found["transformers 4.57"] == RIGHT


def test_a_model_that_lacks_sublayers_is_read_by_no_other() -> None:
    model = tiny_model()
    drop_layers(model, [3], unit="sublayer")
    assert set(verdicts(model.config).values()) == {WRONG}


@pytest.mark.parametrize("dropped", [[2], [1, 2]])
def test_an_encoder_whose_kinds_are_worked_out(dropped: list[int]) -> None:
    values = {name: value for name, value in COMMON.items() if name not in ("num_key_value_heads", "head_dim")}
    config = AutoConfig.for_model("modernbert", **values, local_attention=8, cls_token_id=1, sep_token_id=2)
    config.layer_types = [kind for i, kind in enumerate(config.layer_types) if i not in dropped]
    config.num_hidden_layers -= len(dropped)
    by_number = ["sliding_attention" if i % 3 else "full_attention" for i in range(config.num_hidden_layers)]
    assert verdicts(config)["transformers 4.57"] == (RIGHT if by_number == config.layer_types else WRONG)


def test_the_card_and_inspect_say_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from trimllm_hf.cli import app

    model = tiny_model("gemma3_text", num_hidden_layers=12, query_pre_attn_scalar=8)
    drop_layers(model, [1, 3, 6, 8, 10])
    model.save_pretrained(tmp_path)
    write_card(tmp_path, measured=False)
    card = (tmp_path / "README.md").read_text()
    assert "| llama.cpp b11549 | not right: it works out what each layer is from a layer's number" in card
    assert "| CTranslate2 4.8 | right: it reads from the config what each layer is; in one pass: it generates" in card
    said = CliRunner().invoke(app, ["inspect", str(tmp_path)]).output
    assert "llama.cpp b11549: not right" in said and "transformers 5: right" in said
    plain = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).output)
    assert {each["reader"] for each in plain["readers"]} == {"transformers 5", *(reader.name for reader in READERS)}


def test_a_run_drops_so_that_it_stays_portable(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", num_hidden_layers=12, query_pre_attn_scalar=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trim = TrimConfig(target_layers=6, importance="block_influence", calibration_size=2, portable=True)
    TrimTrainer(model, arguments, train_dataset=tiny_texts(16), trim=trim).train()
    assert model.config.num_hidden_layers == 6 and not unlike_default(model.config)
    assert verdicts(model.config)["llama.cpp b11549"] == RIGHT
    with pytest.raises(ValueError, match=r"can be trimmed to, got 3 layers.*It can be trimmed to 6"):
        trim = TrimConfig(target_layers=3, importance="block_influence", calibration_size=2, portable=True)
        TrimTrainer(
            tiny_model("gemma3_text", num_hidden_layers=12), arguments, train_dataset=tiny_texts(16), trim=trim
        ).train()
    with pytest.raises(ValueError, match="unit='block' with portable"):
        TrimConfig(target_layers=2, unit="sublayer", portable=True)


def test_a_model_without_kinds_is_always_portable() -> None:
    from trimllm_hf.surgery.drop import plan_drop

    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    assert plan_drop(model, [1, 4], portable=True).apply().kept_layers == (0, 2, 3, 5)


TYPES = {  # for the slow test: who reads kinds, who works them out, and who has none
    "causal": ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "cohere2", "gpt_neox", "phi"],
    "more": ["olmo3", "granitemoehybrid", "gpt2", "deepseek_v3", "mixtral", "qwen3_next", "afmoe", "recurrent_gemma"],
    "classification": ["modernbert", "bert"],
    "seq2seq": ["t5", "bart"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("readers")
    wanted = [model_type for types in TYPES.values() for model_type in types]
    if given := os.environ.get("TRIMLLM_READER_TYPES"):
        wanted = [] if given == "all" else given.split()  # all that the zoo has: hours
    command = [sys.executable, str(HERE / "folders.py"), str(root), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600 if "TRIMLLM_READER_TYPES" in os.environ else 1800)
@pytest.mark.parametrize("reader", IN_ENVIRONMENT)
def test_each_reader_is_what_its_verdict_says(reader: str, folders: Path) -> None:
    python = ENVIRONMENTS / reader / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{python} is not here: make readers, or name a folder of environments in TRIMLLM_READERS")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), str(HERE / "read.py"), reader, str(folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lacking = {row["name"].removesuffix("-base") for row in rows if row["name"].endswith("-base") and "error" in row}
    counted, wrong = {RIGHT: 0, WRONG: 0, UNTRIED: 0}, []
    for row in rows:
        verdict = verdicts(AutoConfig.from_pretrained(folders / row["name"]))[IN_ENVIRONMENT[reader]]
        equal = "error" not in row and row["difference"] <= 2e-3 * row["range"]
        if row["name"].removesuffix("-base").partition("-without-")[0] in lacking:
            continue  # it has no such class, and says so
        counted[verdict] += 1
        if (verdict == RIGHT and not equal) or (verdict == WRONG and equal):
            wrong.append((verdict, row))
    assert not wrong
    assert counted[RIGHT] >= (1 if "TRIMLLM_READER_TYPES" in os.environ else 6)
