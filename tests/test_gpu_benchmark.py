"""benchmarks/gpu.py: README.md says what its record says, a part that fails stops no other, and the toy run goes through."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


gpu = load()


def test_readme_says_what_the_record_says() -> None:
    record = json.loads(gpu.RECORD.read_text(encoding="utf-8")) if gpu.RECORD.is_file() else None
    readme = gpu.README.read_text(encoding="utf-8")
    assert gpu.rewritten(readme, record) == readme, "run python benchmarks/gpu.py --readme"
    for name, text in gpu.sections(record).items():
        assert f"<!-- gpu: {name} -->\n{text}\n<!-- /gpu: {name} -->" in readme
        assert record is not None or text.startswith("**Not run")


def test_each_part_has_a_section_and_every_engine_a_part() -> None:
    names = [part.name for part in gpu.parts(toy=False)]
    assert len(set(names)) == len(names)
    for name in names:
        assert name.partition(",")[0] in gpu.sections(None), name
    engines = {name.removeprefix("drop, ") for name in names if name.startswith("drop")}
    assert engines == {"local", "ddp", "fsdp2", "zero1", "zero2", "zero3"}


SCRIPTS = {
    "good.py": "print('| a | 1 |'); import json, sys; open(sys.argv[-1] + '/good.json', 'w').write(json.dumps({'a': 1}))",
    "bad.py": "print('| half |', flush=True); raise ValueError('Expected a GPU, got none.')",
    "hangs.py": "import time; time.sleep(60)",
}


def test_a_part_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    chosen = [gpu.Part("scan", (name,), limit=1 if name == "hangs.py" else 60) for name in ("bad.py", "hangs.py", "good.py")]
    chosen.append(gpu.Part("drop, zero1", ("good.py",), needs=("no_such_package",)))
    monkeypatch.setattr(gpu, "parts", lambda toy: chosen)
    record = tmp_path / "record.json"
    assert gpu.main(["--record", str(record)]) == 1
    plain = json.loads(record.read_text(encoding="utf-8"))
    said = [outcome["not_run"] for outcome in plain["outcomes"]]
    assert said == ["ValueError: Expected a GPU, got none.", "not done after 1 s", None, "no_such_package is not installed"]
    assert plain["outcomes"][2]["results"]["good.json"] == {"a": 1}
    text = gpu.sections(plain)["scan"]
    assert "| a | 1 |" in text and "Expected a GPU, got none" in text and "not done after 1 s" in text
    part = gpu.Part("scan", ("good.py",))
    assert gpu.run(part, tmp_path / "out", time.monotonic()).not_run == "no time was left"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_toy_run_goes_through(tmp_path: Path) -> None:
    """All that it has, but for what a CPU cannot do, which is told."""
    record = tmp_path / "toy.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--toy", "--record", str(record)]
    command += ["--only", "latency", "scan", "selection", "drop, local", "drop, ddp", "drop, fsdp2"]
    subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    plain = json.loads(record.read_text(encoding="utf-8"))
    outcomes = {outcome["name"]: outcome for outcome in plain["outcomes"]}
    failed = {name: outcome["not_run"] for name, outcome in outcomes.items() if outcome["not_run"]}
    assert failed.keys() == {"latency, tiny, compiled"} and "accelerator" in failed["latency, tiny, compiled"]
    (latency,) = [v for k, v in outcomes["latency, tiny, dynamic"]["results"].items() if k.endswith("-trimmed.json")]
    assert latency["sizes"]["num_layers"] == 2 and latency["base_sizes"]["num_layers"] == 4 and latency["speedups"]
    assert outcomes["scan"]["results"]["scan-tiny.json"]["largest_difference"] < 1e-5
    ways = outcomes["selection"]["results"]["select-tiny.json"]["rows"]
    assert all(len(way["layers"]) == 3 for way in ways) and {"lazy", "block influence"} <= {way["way"] for way in ways}
    kinds = {"local": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    for engine, kind in kinds.items():
        (result,) = outcomes[f"drop, {engine}"]["results"].values()
        assert result["distributed_type"] == kind and len(result["drops"]) == 2
        assert all(row["step_peak"] > 0 for row in result["drops"])
    text = "\n".join(gpu.sections(plain).values())
    assert text.count("| ddp | 1 |") == 1 and "before and after each drop" in text
