"""Frozen weights under every engine: adapters, and the sparse update. Two processes train as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_each_engine import SCRIPT, TYPES, check_equal, one_rank, results

pytestmark = pytest.mark.distributed


def engines(fast: tuple[str, ...], names: tuple[str, ...]) -> list:
    return [
        pytest.param(
            name,
            marks=[
                *([pytest.mark.deepspeed] if "zero" in name else []),
                *([] if name in fast else [pytest.mark.slow]),
            ],
        )
        for name in names
    ]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def of(*flags: str) -> Path:
        key = " ".join(flags)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("one")
            subprocess.run([sys.executable, SCRIPT, made[key], *flags], check=True, timeout=240, capture_output=True)
            assert one_rank(made[key])["distributed_type"] == "NO"
        return made[key]

    return of


@pytest.mark.parametrize("engine", engines(("fsdp2",), ("plain", "fsdp2", "zero2", "zero3")))
def test_adapters(engine: str, torchrun, one_process, tmp_path: Path) -> None:
    reference = one_process("--lora")
    torchrun("train.py", str(tmp_path), "--engine", engine, "--lora")
    one = one_rank(reference)
    for rank in results(tmp_path):
        assert rank["distributed_type"] == TYPES[engine]
        assert rank["kept_layers"] == one["kept_layers"] and len(one["kept_layers"]) == 4
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-5) and len(one["losses"]) == 12
        assert rank["rates"] == pytest.approx(one["rates"], rel=1e-12)
        assert rank["unchanged"] == [True, True] and rank["elements"] == [0, 0]
        assert engine == "zero3" or rank["alive"] == [0, 0]  # there two empty ones of a dropped layer live on
        assert rank["trained"] == one["trained"] and all("lora_" in name for name in one["trained"])
    expected, mine = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (reference, tmp_path))
    assert mine.keys() == expected.keys() and len(mine) == 4 * 4 + 1  # and the stop for deeper bases
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5)
    maps = [json.loads((folder / "final" / "trim_map.json").read_text()) for folder in (reference, tmp_path)]
    scores = [[record.pop("scores") for record in plain["history"]] for plain in maps]
    assert len(scores[0]) == 2
    assert maps[0] == maps[1]
    for mine, expected in zip(*reversed(scores), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5) and len(mine) == 1


@pytest.mark.parametrize("engine", engines((), tuple(TYPES)))
def test_the_sparse_update(engine: str, torchrun, one_process, tmp_path: Path) -> None:
    reference = one_process("--trainable_ratio", "0.5")
    torchrun("train.py", str(tmp_path), "--engine", engine, "--trainable_ratio", "0.5")
    check_sparse(tmp_path, engine, reference)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_the_sparse_update_of_a_model_made_in_shards(torchrun, one_process, tmp_path: Path) -> None:
    """ZeRO-3 shards a model as it is loaded: there it is scored before it has an engine."""
    reference = one_process("--trainable_ratio", "0.5", "--born")
    torchrun("train.py", str(tmp_path), "--engine", "zero3", "--trainable_ratio", "0.5", "--born")
    check_sparse(tmp_path, "zero3", reference)


def check_sparse(folder: Path, engine: str, reference: Path) -> None:
    check_equal(folder, engine, reference, 1e-5)
    one = one_rank(reference)
    assert len(one["trained_layers"]) == 3
    for rank in results(folder):
        assert rank["trained_layers"] == one["trained_layers"] and rank["trained"] == one["trained"]
        assert rank["alive"] == [0, 0] and rank["unchanged"] == [True, True]
