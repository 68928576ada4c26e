"""A push to a Hub over HTTP: what arrives, under which name, and what a reader gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALICE, BOB, READER, Place, environment
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM

from trimllm_hf import drop_layers
from trimllm_hf.surgery.remote_code import write_remote_code

pytestmark = pytest.mark.hub

SENT = {"README.md", "kept_layers.png", "trim_report.json", "config.json", "generation_config.json"}

# Stock transformers, by name: the package cannot be imported here, unless it is asked for.
LOAD = """
import json, sys
how, name, ids, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if how == "package":
    import trimllm_hf
else:
    sys.modules["trimllm_hf"] = None
import torch, transformers
trust = {"trust_remote_code": True} if how == "code" else {}
model, told = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **trust)
assert not told["missing_keys"] and not told["unexpected_keys"], told
torch.save(model.eval()(torch.tensor(ids)).logits.detach(), out)
"""


def load(
    place: Place, name: str, out: Path, token: str | None = None, how: str = "stock"
) -> subprocess.CompletedProcess[str]:
    given = {"HF_TOKEN": token} if token else {}
    env = environment(place.hub, out.with_suffix(".home"), place.way == "xet", **given)
    if how != "package":
        del env["PYTHONPATH"]
    command = [sys.executable, "-c", LOAD, how, name, json.dumps(tokens().tolist()), str(out)]
    return subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens()).logits


def test_one_commit_holds_the_folder(every_way: Place, folder: Path) -> None:
    hub = every_way.hub
    done = every_way.client.push(folder, "alice/first")
    held = hub.files("alice/first")
    assert hub.history("alice/first") == ["4 of 6 layers", "initial commit"]
    weights = {path.name for path in folder.glob("model*")}
    assert len(weights) == 3  # in shards, and their index
    assert held.keys() == SENT | weights | {".gitattributes"}
    assert all(held[name] == (folder / name).read_bytes() for name in SENT | weights)
    assert hub.refs("alice/first")["refs/tags/trim-4of6"] == hub.refs("alice/first")["refs/heads/main"] == done.oid
    assert done.new and done.tag == "trim-4of6"
    assert {"training_args.bin", "optimizer.pt", "checkpoint-3/"} == set(done.left_out)
    assert "optimizer.pt" in done.log and "kB" in done.log
    uploads = hub.calls("^(POST /cas/v1/xorbs|PUT /lfs/)")
    assert uploads and bool(hub.calls("xorbs")) == (every_way.way == "xet")
    assert bool(hub.calls("PUT /lfs/.*/2")) == (every_way.way == "multipart")

    again = every_way.client.push(folder, "alice/first")
    assert not again.new and again.oid == done.oid and "no commit was made" in again.log
    assert len(hub.history("alice/first")) == 2 and len(hub.calls("/commit/")) == 1


def test_a_shallower_model_replaces_the_deeper_one(every_way: Place, folder: Path) -> None:
    """Old shards go in the same commit; the deeper model stays under its tag; a pickle of the Trainer's own push goes."""
    hub, client = every_way.hub, every_way.client
    first = client.push(folder, "alice/shallower")
    repo = hub.store.repos["alice/shallower"]
    files = {**repo["commits"][first.oid]["files"], "training_args.bin": hub.store.put_blob(b"pickle")}
    hub.store.add_commit(repo, "refs/heads/main", files, "Training in progress", "alice")
    for path in folder.glob("model*"):
        path.unlink()
    model = tiny_model()
    drop_layers(model, [1, 3, 4])
    model.save_pretrained(folder)
    second = client.push(folder, "alice/shallower")
    held = hub.files("alice/shallower")
    assert held.keys() == SENT | {".gitattributes", "model.safetensors"}
    assert len(hub.history("alice/shallower")) == 4
    refs = hub.refs("alice/shallower")
    assert (refs["refs/tags/trim-4of6"], refs["refs/tags/trim-3of6"]) == (first.oid, second.oid)


def test_a_mended_card_moves_the_tag(place: Place, folder: Path) -> None:
    first = place.client.push(folder, "alice/mended")
    card = folder / "README.md"
    card.write_text(card.read_text() + "More.\n")
    place.hub.mend()
    second = place.client.push(folder, "alice/mended", commit_message="Say more")
    assert place.hub.history("alice/mended")[0] == "Say more"
    assert place.hub.refs("alice/mended")["refs/tags/trim-4of6"] == second.oid != first.oid
    assert f"moves from {first.oid}" in second.log
    assert not place.hub.calls("xorbs")  # the weights were not sent again


def test_loads_by_name_without_the_package(every_way: Place, folder: Path, tmp_path: Path) -> None:
    every_way.client.push(folder, "alice/loaded")
    result = load(every_way, "alice/loaded", tmp_path / "logits")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), logits(folder))


@pytest.mark.slow
def test_halves_of_blocks_load_with_the_package_or_their_code_and_fail_loudly_without(
    place: Place, folder: Path, tmp_path: Path
) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    model = tiny_model(seed=7)
    drop_layers(model, [5, 8], unit="sublayer")
    model.save_pretrained(folder)
    expected = model(tokens()).logits.detach()
    done = place.client.push(folder, "alice/halves")
    assert done.tag == "trim-10of12-sublayers" and place.hub.history("alice/halves")[0] == "10 of 12 attentions and MLPs"
    assert load(place, "alice/halves", tmp_path / "package", how="package").returncode == 0
    assert torch.equal(torch.load(tmp_path / "package"), expected)
    stock = load(place, "alice/halves", tmp_path / "stock")
    assert stock.returncode != 0 and "trimllm" in stock.stderr
    write_remote_code(folder)
    place.client.push(folder, "alice/halves")
    assert load(place, "alice/halves", tmp_path / "code", how="code").returncode == 0
    assert torch.equal(torch.load(tmp_path / "code"), expected)


@pytest.mark.slow
def test_private_and_gated_models_load_for_those_who_may(place: Place, folder: Path, tmp_path: Path) -> None:
    assert place.client.push(folder, "alice/hidden", private=True).new
    assert place.client.push(folder, "alice/gated").new
    place.client.call("update_repo_settings", repo_id="alice/gated", gated="manual")
    for name in ("alice/hidden", "alice/gated"):
        assert load(place, name, tmp_path / "mine", READER).returncode == 0
        for token in (BOB, None):
            result = load(place, name, tmp_path / "theirs", token)
            hidden = "GatedRepoError" not in result.stderr and (token is None or "404" in result.stderr)
            assert result.returncode != 0 and hidden == (name == "alice/hidden"), result.stderr
    place.client.call("grant_access", repo_id="alice/gated", user="bob")
    assert load(place, "alice/gated", tmp_path / "granted", BOB).returncode == 0
    assert place.client.push(folder, "alice/gated").new is False  # its owner may push to it as before


def test_private(place: Place, folder: Path) -> None:
    assert place.client.push(folder, "alice/secret", private=True).new
    assert place.hub.store.repos["alice/secret"]["private"]
    assert place.client.push(folder, "alice/secret").new is False  # and private it stays
    assert place.hub.store.repos["alice/secret"]["private"]
    place.client.push(folder, "alice/open")
    place.hub.mend()
    (folder / "README.md").write_text((folder / "README.md").read_text() + "Confidential.\n")
    refused = place.client.push(folder, "alice/open", private=True)
    assert refused.error == "ValueError" and "exists and is public" in refused.message
    assert not place.hub.calls("/(preupload|commit|tag)/")


def test_the_name_alone_is_the_users_own(place: Place, folder: Path) -> None:
    assert place.client.push(folder, "short").repo_id == "alice/short"
    assert place.client.push(folder, "acme/of-the-organization").new


def test_a_branch_is_made(place: Place, folder: Path) -> None:
    done = place.client.push(folder, "alice/branched", revision="trimmed", tag="v1")
    refs = place.hub.refs("alice/branched")
    assert refs["refs/heads/trimmed"] == refs["refs/tags/v1"] == done.oid
    assert place.hub.files("alice/branched").keys() == {".gitattributes"}
    missing = place.client.push(folder, "alice/branched", revision="nowhere", create_pr=True)
    assert missing.error == "ValueError" and "'nowhere'" in missing.message


def test_a_pull_request_to_someone_else(every_way: Place, folder: Path) -> None:
    hub, client = every_way.hub, every_way.client
    client.call("create_repo", repo_id="alice/asked")
    done = client.push(folder, "alice/asked", token=BOB, create_pr=True)
    assert done.pr == "refs/pr/1" and done.pr_url == f"{hub.url}/alice/asked/discussions/1" and done.tag is None
    assert hub.files("alice/asked").keys() == {".gitattributes"}
    again = client.push(folder, "alice/asked", token=BOB, create_pr=True)
    assert not again.new and again.pr == "refs/pr/1"
    assert list(hub.refs("alice/asked")) == ["refs/heads/main", "refs/pr/1"]
    (folder / "README.md").write_text((folder / "README.md").read_text() + "More.\n")
    more = client.push(folder, "alice/asked", token=BOB, revision="refs/pr/1", commit_message="More")
    assert more.oid == hub.refs("alice/asked")["refs/pr/1"] != done.oid and more.tag is None
    client.call("merge_pull_request", repo_id="alice/asked", discussion_num=1)
    assert hub.files("alice/asked")["model.safetensors.index.json"]
    assert hub.history("alice/asked") == ["More", "4 of 6 layers", "initial commit"]
    absent = client.push(folder, "alice/absent", token=BOB, create_pr=True)
    assert absent.error == "ValueError" and "does not see" in absent.message


def test_what_the_hub_left_out_is_found(place: Place, folder: Path) -> None:
    place.client.call("create_repo", repo_id="alice/ignoring")
    repo, store = place.hub.store.repos["alice/ignoring"], place.hub.store
    files = store.files(repo, "main")[1] | {".gitignore": store.put_blob(b"*.safetensors\n")}
    store.add_commit(repo, "refs/heads/main", files, "ignore", "alice")
    done = place.client.push(folder, "alice/ignoring")
    assert done.error == "PushError" and done.landed is True and "lacks model-00001" in done.message
    assert ".gitignore" in done.message
    assert ALICE not in done.message + done.log


def test_a_path_of_this_machine_is_not_published(place: Place, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["trim"]["base_model"] = "/home/someone/base"
    (folder / "config.json").write_text(json.dumps(config))
    assert "The base '/home/someone/base' is a local path" in place.client.push(folder, "alice/local").log
    assert b"/home/someone" not in b"".join(place.hub.files("alice/local").values())
    assert json.loads(place.hub.files("alice/local")["config.json"])["trim"]["base_model"] is None
    config["trim"]["base_model"] = "org/base"
    (folder / "config.json").write_text(json.dumps(config))
    assert "is a local path" not in place.client.push(folder, "alice/local").log


def test_the_environment_of_tests_reaches_no_other_hub(place: Place, tmp_path: Path) -> None:
    env = environment(place.hub, tmp_path)
    assert (
        env["HF_ENDPOINT"].startswith("http://127.0.0.1:") and "HF_TOKEN" not in env and os.environ["HF_HUB_OFFLINE"] == "1"
    )
