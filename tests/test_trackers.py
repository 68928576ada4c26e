"""Depth, score and drops arrive in the trackers as scalars, the kept layers as a picture, each read by its own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_trackers as t; t.train(t.Path(sys.argv[3]), 'trackio')"
    tests = Path(__file__).parent
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tests), str(tests.parent), str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
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
