"""`trimllm inspect` of a model on the Hub reads its config and the headers of its weight files, and no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Place
from safetensors.torch import load_file

pytestmark = pytest.mark.hub


def test_only_headers_are_read(place: Place, folder: Path) -> None:
    place.client.push(folder, "alice/inspected")
    place.hub.mend()
    done = place.client.call("trimllm", line=["inspect", "alice/inspected", "--json"])
    assert done.code == 0, done.errors
    plain = json.loads(done.out)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    held = [tensor for name in shards for tensor in load_file(folder / name).values()]
    assert plain["strip"] == "█░██░█" and plain["weights"]["files"] == shards
    assert plain["weights"]["parameters"] == sum(tensor.numel() for tensor in held)
    assert plain["weights"]["bytes"] == sum(tensor.nbytes for tensor in held)
    assert place.hub.calls("^GET /(cdn|cas)") == [206] * len(shards), "a whole file was asked for, or a shard twice"


def test_what_is_not_there_or_is_no_model_is_said(place: Place, folder: Path) -> None:
    done = place.client.call("trimllm", line=["inspect", "alice/nowhere"])
    assert done.code == 1 and "alice/nowhere" in done.errors
    (folder / "config.json").write_text("{}")
    assert place.client.call("trimllm", line=["inspect", str(folder)]).code == 1
