"""Depth, score and drops arrive in the trackers as scalars, the kept layers as a picture, each read by its own reader."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimllm_hf import LayerMap, TrimCallback, TrimConfig
from trimllm_hf.training.strip_image import send_strip

DEPTHS = [(2, 5.0), (4, 4.0)]  # step, layers


def train(folder: Path, tracker: str) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=6, logging_steps=1, report_to=[tracker], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trim = TrimCallback(TrimConfig(target_layers=4, drop_every="2", importance="last", repair="none"))
    Trainer(tiny_model(), arguments, train_dataset=tiny_texts(24, length=8), callbacks=[trim]).train()


def train_in_process(folder: Path, tracker: str, settings: dict[str, str], after: str = "") -> None:
    """The same in a process of its own, with settings in its environment."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_trackers as t; t.train(t.Path(sys.argv[3]), sys.argv[4])"
    tests = Path(__file__).parent
    command = [sys.executable, "-c", code + after, str(tests), str(tests.parent), str(folder), tracker]
    env = {**os.environ, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/trim/num_layers")] == DEPTHS
    assert {"train/trim/parameters", "train/trim/score", "train/loss"} <= set(events.Tags()["scalars"])
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pictures = events.Images("trim/layers")
    assert [picture.step for picture in pictures] == [step for step, _ in DEPTHS]
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string
    assert pictures[0].width > 2 * pictures[0].height


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    # a folder: the lean package, mlflow-skinny, has no database
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "ml").as_uri())
    mlflow.set_tracking_uri((tmp_path / "ml").as_uri())
    train(tmp_path / "run", "mlflow")
    mlflow.end_run()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "trim/num_layers")
    assert [(metric.step, metric.value) for metric in history] == DEPTHS
    assert {"trim/parameters", "trim/score"} <= run.data.metrics.keys()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {f"trim_layers_{step}.png" for step, _ in DEPTHS} <= files


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """What was logged at each step: the run's file is a log of LevelDB (records cut into blocks of 32 KiB) of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, rows = file.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: zeros to the end of the block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


def test_wandb(tmp_path: Path) -> None:
    """Its file is complete once the service that writes it has ended, with the process that trained."""
    pytest.importorskip("wandb", reason="W&B is not installed")
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    train_in_process(tmp_path / "run", "wandb", settings, "; import wandb; wandb.finish()")
    (file,) = tmp_path.rglob("run-*.wandb")
    rows = wandb_rows(file)
    found = [(row["train/global_step"], row["train/trim/num_layers"]) for row in rows if "train/trim/num_layers" in row]
    assert found == DEPTHS and {"train/trim/parameters", "train/trim/score", "train/loss"} <= {
        name for row in rows for name in row
    }
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pictures = [row for row in rows if row.get("trim/layers/_type") == "image-file"]
    assert [row["train/global_step"] for row in pictures] == [step for step, _ in DEPTHS]
    assert all((file.parent / "files" / row["trim/layers/path"]).stat().st_size > 500 for row in pictures)


READ = """
import sqlite3, sys, json
from pathlib import Path
found = []
for file in Path(sys.argv[1]).rglob("*.db"):
    for step, metrics in sqlite3.connect(file).execute("SELECT step, metrics FROM metrics ORDER BY id"):
        found.append((step, json.loads(metrics)))
print(json.dumps(found))
"""


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is read from the environment at import: the run is a process of its own."""
    pytest.importorskip("trackio", reason="Trackio is not installed")
    train_in_process(tmp_path / "run", "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"})
    read = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "trackio")], capture_output=True, text=True, check=True
    )
    rows = [metrics for _, metrics in json.loads(read.stdout)]
    depths = [value for row in rows for name, value in row.items() if name.endswith("trim/num_layers")]
    assert depths == [value for _, value in DEPTHS]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pictures = [value for row in rows for name, value in row.items() if name.endswith("trim/layers")]
    assert len(pictures) == len(DEPTHS)


def test_a_tracker_that_takes_no_picture_costs_nothing() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    class TensorBoardCallback(TrainerCallback):
        """As transformers calls its own."""

        @property
        def tb_writer(self) -> None:
            raise OSError("no room left")

    send_strip([TensorBoardCallback(), TrainerCallback()], LayerMap.from_config(tiny_model().config), 3)  # no error
