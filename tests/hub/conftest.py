"""A local Hub and a client of it, and a trimmed model's folder to push."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from localhub import LocalHub
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from trimllm_hf import drop_layers

ROOT = Path(__file__).resolve().parents[2]
ALICE, READER, BOB = "hf_alice_may_write", "hf_alice_may_only_read", "hf_bob_may_write"

CARD = """---
base_model: org/base
base_model_relation: finetune
library_name: transformers
license: apache-2.0
tags: [pruned, trimmed]
---
# Four of six layers

![kept layers](kept_layers.png)
"""
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


def environment(hub: LocalHub, home: Path, xet: bool = True, **more: str) -> dict[str, str]:
    """What a process needs to talk to the local Hub, and to nothing else."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {
        **inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "0" if xet else "1", "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1,localhost",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", **more,
    }  # fmt: skip


class Client:
    """A process that makes calls; see client.py."""

    def __init__(self, hub: LocalHub, home: Path, xet: bool) -> None:
        home.mkdir()
        self.errors = home / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("client.py")],
            env=environment(hub, home, xet), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors.open("w"),
            text=True,
        )  # fmt: skip
        assert self.line() == "ready\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return line

    def send(self, name: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps({"name": name, "arguments": {"token": ALICE, **arguments}}), file=self.process.stdin, flush=True)

    def call(self, name: str, **arguments: Any) -> SimpleNamespace:
        self.send(name, **arguments)
        return SimpleNamespace(**json.loads(self.line()))

    def push(self, folder: Path, repo_id: str, **arguments: Any) -> SimpleNamespace:
        return self.call("push", folder=str(folder), repo_id=repo_id, **arguments)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


class Place(SimpleNamespace):
    """A Hub, a client of it, and how the client sends large files."""

    hub: LocalHub
    client: Client


WAYS = {"xet": {"xet": True}, "lfs": {"xet": False}, "multipart": {"xet": False, "part": 40_000}}


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Place]]:
    made: dict[str, Place] = {}

    def place(way: str) -> Place:
        if way not in made:
            root = tmp_path_factory.mktemp(way)
            hub = LocalHub(root / "hub", **WAYS[way])
            made[way] = Place(hub=hub, client=Client(hub, root / "home", WAYS[way]["xet"]), root=root, way=way)
        made[way].hub.mend()
        return made[way]

    yield place
    for each in made.values():
        each.client.close()
        each.hub.close()


@pytest.fixture
def place(places: Callable[[str], Place]) -> Place:
    """The default way, Xet."""
    return places("xet")


@pytest.fixture(
    params=[
        pytest.param("xet"),
        pytest.param("lfs", marks=pytest.mark.slow),
        pytest.param("multipart", marks=pytest.mark.slow),
    ]
)
def every_way(places: Callable[[str], Place], request: pytest.FixtureRequest) -> Place:
    """Xet and, among the slow tests, LFS whole and in parts."""
    return places(request.param)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a run leaves it: a model of four of six layers in two shards, its card and picture, and leavings."""
    folder = tmp_path_factory.mktemp("finished")
    model = tiny_model()
    drop_layers(model, [1, 4])
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "README.md").write_text(CARD)
    (folder / "kept_layers.png").write_bytes(PNG)
    (folder / "trim_report.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, to spoil; with other weights, since the Hub takes no bytes twice."""
    copy = Path(shutil.copytree(finished, tmp_path / "model"))
    for shard in copy.glob("model-*.safetensors"):
        weights = {name: torch.randn_like(tensor) / 8 for name, tensor in load_file(shard).items()}
        save_file(weights, shard, metadata={"format": "pt"})
    return copy
