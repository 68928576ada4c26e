"""Under every engine two processes drop attentions and MLPs as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_each_engine import SCRIPT, TYPES, one_rank, results, weights
from transformers import AutoModelForCausalLM

from trimllm_hf import LayerMap

pytestmark = pytest.mark.distributed

FAST = ("fsdp2",)  # keeps attention and MLP of a block in one piece
ENGINES = [
    pytest.param(
        name,
        marks=[*([pytest.mark.deepspeed] if "zero" in name else []), *([] if name in FAST else [pytest.mark.slow])],
    )
    for name in TYPES
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, SCRIPT, folder, "--unit", "sublayer"], check=True, timeout=240)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine: str, torchrun, one_process: Path, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine, "--unit", "sublayer")
    one = one_rank(one_process)
    attention, mlp = one["kept_halves"]
    assert len(attention) + len(mlp) == 6 and max(len(attention), len(mlp)) < 6
    for rank in results(tmp_path):
        assert rank["distributed_type"] == TYPES[engine]
        assert (rank["kept_layers"], rank["kept_halves"]) == (one["kept_layers"], one["kept_halves"])
        assert len(rank["losses"]) == 12 and rank["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert rank["rates"] == pytest.approx(one["rates"], rel=1e-12)
        assert rank["alive"] == [0, 0]
        assert rank["unchanged"] == [True, True]  # fp32 parameters and both moments, bit by bit
    expected, mine = weights(one_process), weights(tmp_path)
    assert expected.keys() <= mine.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5)
    final, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layer_map = LayerMap.from_config(final.config)
    assert len(layer_map.sublayers) == 6 and layer_map.num_layers < 6
    to_saved_config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (to_saved_config["model_type"] == "llama") == layer_map.has_all_sublayers
    assert len(load_file(tmp_path / "final" / "model.safetensors")) == len(mine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_choose_by_the_times_of_the_main_one(engine: str, torchrun, tmp_path: Path) -> None:
    torchrun("train.py", str(tmp_path), "--engine", engine, "--unit", "sublayer", "--per_ms")
    one, other = results(tmp_path)
    assert one["unit_ms"] == other["unit_ms"] and len(one["unit_ms"]) == 12
    assert len(set(one["unit_ms"].values())) == 2 and min(one["unit_ms"].values()) > 0
    assert one["kept_halves"] == other["kept_halves"] and sum(map(len, one["kept_halves"])) == 6
    assert one["losses"] == other["losses"]
