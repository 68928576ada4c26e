"""A push to a Hub over HTTP: what arrives, what does not, and who may."""

from __future__ import annotations

from pathlib import Path

from conftest import Place

SENT = {"README.md", "kept_layers.png", "trim_report.json", "config.json", "generation_config.json"}


def test_one_commit_holds_the_folder(every_way: Place, folder: Path) -> None:
    hub = every_way.hub
    done = every_way.client.push(folder, "alice/first")
    print(done)
    held = hub.files("alice/first")
    assert hub.history("alice/first") == ["4 of 6 layers", "initial commit"]
    weights = {path.name for path in folder.glob("model*")}
    assert held.keys() == SENT | weights | {".gitattributes"}
    assert all(held[name] == (folder / name).read_bytes() for name in SENT | weights)
    assert hub.refs("alice/first")["refs/tags/trim-4of6"] == hub.refs("alice/first")["refs/heads/main"] == done.oid
    assert done.new and done.tag == "trim-4of6"
    assert {"training_args.bin", "optimizer.pt", "checkpoint-3/"} == set(done.left_out)
    assert "optimizer.pt" in done.log and "kB" in done.log

    again = every_way.client.push(folder, "alice/first")
    assert not again.new and again.oid == done.oid and "no commit was made" in again.log
    assert len(hub.history("alice/first")) == 2
