"""What goes wrong on the way: a repository ends with exactly one good commit or exactly what it had, and one knows which."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ALICE, BOB, Client, Place, environment

pytestmark = pytest.mark.hub

# Every call of a push to a new repository, by its request line.
CALLS = {
    "whoami": "GET /api/whoami-v2",
    "validate": "POST /api/validate-yaml",
    "info": "GET /api/models/[^/]+/[^/]+$",
    "create": "POST /api/repos/create",
    "head": "GET /api/models/.*/revision/",
    "tree": "GET /api/models/.*/tree/",
    "preupload": "POST /api/models/.*/preupload/",
    "commit": "POST /api/models/.*/commit/",
    "refs": "GET /api/models/.*/refs",
    "tag": "POST /api/models/.*/tag/",
}
UPLOADS = {
    "xet": {"token": "GET /api/models/.*/xet-write-token/", "xorb": "POST /cas/v1/xorbs/", "shard": "POST /cas/v1/shards"},
    "lfs": {"batch": "POST /.*/objects/batch", "put": "PUT /lfs/", "verify": "POST /lfs/.*/verify"},
    "multipart": {"part": "PUT /lfs/.*/2", "complete": "POST /lfs/.*/complete"},
}
AFTERWARDS = ("refs", "tag")
WAYS_AND_CALLS = [
    pytest.param(way, call, id=f"{way}-{call}", marks=[] if call in quick else pytest.mark.slow)
    for way, quick in {"xet": ("validate", "create", "commit", "tag"), "lfs": (), "multipart": ()}.items()
    for call in {**(CALLS if way != "multipart" else {}), **UPLOADS[way]}
]


def call_of(way: str, call: str) -> str:
    return {**CALLS, **UPLOADS[way]}[call]


def is_whole(place: Place, repo_id: str, folder: Path, commits: int = 2) -> bool:
    """One commit on top of the first, with every file of the folder, and its tag."""
    held = place.hub.files(repo_id)
    expected = {name: (folder / name).read_bytes() for name in [*(p.name for p in folder.glob("model*")), "README.md"]}
    refs = place.hub.refs(repo_id)
    return (
        len(place.hub.history(repo_id)) == commits
        and {name: held.get(name) for name in expected} == expected
        and refs.get("refs/tags/trim-4of6") == refs["refs/heads/main"]
    )


@pytest.mark.parametrize(("way", "call"), WAYS_AND_CALLS)
def test_busy_for_a_moment(places, folder: Path, way: str, call: str) -> None:
    place = places(way)
    fault = place.hub.fail(call_of(way, call), times=1)
    done = place.client.push(folder, f"alice/busy-{call}")
    assert fault.times == 0
    assert getattr(done, "new", done), done
    assert is_whole(place, f"alice/busy-{call}", folder)


@pytest.mark.parametrize(("way", "call"), WAYS_AND_CALLS)
def test_the_answer_is_lost(places, folder: Path, way: str, call: str) -> None:
    """The Hub does what it was asked to; the client never hears of it. Once more, it must not be done twice."""
    place = places(way)
    fault = place.hub.fail(call_of(way, call), lose_reply=True)
    done = place.client.push(folder, f"alice/lost-{call}")
    assert fault.times == 0
    assert getattr(done, "new", done), done
    assert is_whole(place, f"alice/lost-{call}", folder)
    if call in ("create", "tag"):  # the second time it is there already
        assert place.hub.calls(CALLS[call])[-1] == 409
    if call == "commit":
        assert f"The commit landed, as {done.oid}, although the response was lost" in done.log
        assert len(place.hub.calls(CALLS["commit"])) == 1


@pytest.mark.parametrize(("way", "call"), WAYS_AND_CALLS)
def test_down(places, folder: Path, way: str, call: str) -> None:
    """It gives up, and says what the repository holds. The next push ends it."""
    place, name = places(way), f"alice/down-{call}"
    place.hub.fail(call_of(way, call), times=10**6)
    failed = place.client.push(folder, name)
    assert failed.error == "PushError", failed
    repo = place.hub.store.repos.get(name)
    if call in AFTERWARDS:
        assert failed.landed is True and "landed in" in failed.message and "trim-4of6 is not set" in failed.message
        assert len(place.hub.history(name)) == 2
    else:
        assert failed.landed is (None if call == "head" and repo and place.hub.calls("/commit/") else False)
        assert repo is None or place.hub.history(name) == ["initial commit"]
        assert "as it was" in failed.message or (repo and "in which this push has created the repository" in failed.message)
    place.hub.mend()
    assert place.client.push(folder, name).new is (call not in AFTERWARDS)
    assert is_whole(place, name, folder)


@pytest.mark.parametrize(
    ("way", "call"),
    [
        ("xet", "xorb"),
        pytest.param("lfs", "put", marks=pytest.mark.slow),
        pytest.param("multipart", "part", marks=pytest.mark.slow),
        ("xet", "commit"),
    ],
)
@pytest.mark.parametrize("times", [1, pytest.param(10**6, marks=pytest.mark.slow)])
def test_the_wire_is_cut(places, folder: Path, way: str, call: str, times: int) -> None:
    place, name = places(way), f"alice/cut-{way}-{call}-{times}"
    fault = place.hub.fail(call_of(way, call), after_bytes=1000, times=times)
    done = place.client.push(folder, name)
    assert fault.times < times
    if times == 1:
        assert getattr(done, "new", done), done
    else:
        assert done.error == "PushError" and done.landed is False and "stands as it was" in done.message
        assert place.hub.history(name) == ["initial commit"]
        place.hub.mend()
        assert place.client.push(folder, name).new
    assert is_whole(place, name, folder)


def test_a_proxy_answers_in_html(place: Place, folder: Path) -> None:
    fault = place.hub.fail(CALLS["validate"], html=True, times=2)
    assert getattr(done := place.client.push(folder, "alice/html"), "new", done)
    assert fault.times == 0 and is_whole(place, "alice/html", folder)


def test_the_answer_to_a_pull_request_is_lost(place: Place, folder: Path) -> None:
    place.client.call("create_repo", repo_id="alice/pulled")
    place.hub.fail(CALLS["commit"], lose_reply=True)
    done = place.client.push(folder, "alice/pulled", token=BOB, create_pr=True)
    assert done.pr == "refs/pr/1" and "response was lost" in done.log
    assert [ref for ref in place.hub.refs("alice/pulled") if "/pr/" in ref] == ["refs/pr/1"]


def test_lost_and_then_down(place: Place, folder: Path) -> None:
    """Nobody can tell then; it says so, and the next push finds out."""
    place.client.call("create_repo", repo_id="alice/dark")
    place.hub.fail(CALLS["commit"], lose_reply=True, then_down=True)
    failed = place.client.push(folder, "alice/dark")
    assert failed.error == "PushError" and failed.landed is None
    assert "cannot be asked whether the commit landed" in failed.message
    place.hub.mend()
    assert place.client.push(folder, "alice/dark").new is False
    assert is_whole(place, "alice/dark", folder)


def test_someone_else_commits_meanwhile(place: Place, folder: Path) -> None:
    """412: theirs stays, ours is not there; the next push puts it on top."""
    place.client.call("create_repo", repo_id="acme/shared")
    repo, store = place.hub.store.repos["acme/shared"], place.hub.store

    def commit() -> None:
        held.seen.wait()
        files = store.files(repo, "main")[1] | {"theirs.txt": store.put_blob(b"theirs")}
        store.add_commit(repo, "refs/heads/main", files, "theirs", "carol")

    held = place.hub.fail(CALLS["commit"], hold=0.5)
    threading.Thread(target=commit).start()
    failed = place.client.push(folder, "acme/shared")
    assert place.hub.calls(CALLS["commit"]) == [412]
    assert failed.landed is False and "someone else committed" in failed.message
    assert place.hub.history("acme/shared") == ["theirs", "initial commit"]
    assert place.client.push(folder, "acme/shared").new
    assert is_whole(place, "acme/shared", folder, commits=3) and place.hub.files("acme/shared")["theirs.txt"] == b"theirs"


KILLED = {
    "upload": {"match": UPLOADS["xet"]["xorb"], "hold": 1.5},
    "before": {"match": CALLS["commit"], "after_bytes": 0},
    "during": {"match": CALLS["commit"], "hold": 1.5},
    "after": {"match": CALLS["tag"], "hold": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_killed(place: Place, folder: Path, tmp_path: Path, moment: str) -> None:
    """SIGKILL in the middle of a push; whoever pushes again ends with one good commit."""
    name = f"alice/killed-{moment}"
    client = Client(place.hub, tmp_path / "home", xet=True)
    fault = place.hub.fail(**KILLED[moment])
    client.send("push", folder=str(folder), repo_id=name)
    assert fault.seen.wait(60)
    client.process.send_signal(signal.SIGKILL)
    client.process.wait()
    assert len(place.hub.history(name)) <= 2
    done = place.client.push(folder, name)
    if getattr(done, "error", None):  # the dead client's commit was made while this one was on its way
        assert done.landed is False and "someone else committed" in done.message
        done = place.client.push(folder, name)
    assert is_whole(place, name, folder)


@pytest.mark.slow
def test_interrupted_by_hand(place: Place, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C is no error to be tried again: it ends the push."""
    fault = place.hub.fail(UPLOADS["xet"]["xorb"], hold=5)
    code = """import signal, sys; from trimllm_hf.publish.hub import push_to_hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would this
push_to_hub(sys.argv[1], 'alice/stopped')"""
    env = environment(place.hub, tmp_path / "home", HF_TOKEN=ALICE)
    process = subprocess.Popen([sys.executable, "-c", code, folder], env=env, stderr=subprocess.PIPE, text=True)
    assert fault.seen.wait(60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors, errors
    assert place.hub.history("alice/stopped") == ["initial commit"]
    assert place.client.push(folder, "alice/stopped").new and is_whole(place, "alice/stopped", folder)
