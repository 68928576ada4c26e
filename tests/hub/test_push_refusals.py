"""A push that is refused: in words, and before anything was sent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ALICE, BOB, READER, Place

pytestmark = pytest.mark.hub

UNKNOWN = "hf_nobody_has_this_token"
SENDING = r"^(POST|PUT|DELETE) (?!/api/validate-yaml)"


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        pytest.param("", "alice/none", "Expected a token with write access, got none. Run hf auth login", id="no token"),
        pytest.param(UNKNOWN, "alice/bad", "Expected a valid token, got one that the Hub refuses", id="a bad token (401)"),
        pytest.param(READER, "alice/read", "got a read-only one of alice", id="a token that may only read"),
        pytest.param(
            BOB, "alice/taken", "Expected a name under bob, got alice/taken, which is alice's", id="someone else's"
        ),
        pytest.param(BOB, "alice/free", "got alice/free, which is alice's. Push to bob/free", id="someone else's namespace"),
        pytest.param(ALICE, "alice/a--b", "Cannot have -- or .. in repo_id", id="no name"),
        pytest.param(ALICE, "a/b/c", "must be in the form 'repo_name' or 'namespace/repo_name'", id="a path"),
        pytest.param(BOB, "alice/taken", "pull request against, got refs/pr/1", id="a pull request to a pull request"),
    ],
)
def test_who_may_not(place: Place, folder: Path, token: str, repo_id: str, message: str) -> None:
    place.client.call("create_repo", repo_id="alice/taken", exist_ok=True)
    place.hub.mend()
    more = {"revision": "refs/pr/1", "create_pr": True} if "refs/pr" in message else {}
    refused = place.client.push(folder, repo_id, token=token, **more)
    assert message in refused.message, refused
    assert refused.error in ("ValueError", "HFValidationError")
    assert not place.hub.calls(SENDING)
    assert not token or token not in refused.message + refused.log


def test_a_folder_that_is_not_right(place: Place, folder: Path) -> None:
    """Every other way in which it may be wrong: tests/test_publish_checks.py."""
    next(folder.glob("model-00002*")).unlink()
    refused = place.client.push(folder, "alice/torn")
    assert refused.error == "ValueError" and "A save was not finished" in refused.message
    assert not place.hub.log


def test_a_file_that_holds_the_token(place: Place, folder: Path) -> None:
    (folder / "notes.md").write_text(f"export HF_TOKEN={ALICE}\n")
    refused = place.client.push(folder, "alice/leaking")
    assert refused.error == "ValueError" and "the token in notes.md, line 1" in refused.message
    assert ALICE not in refused.message and not place.hub.log


def test_a_card_that_the_hub_does_not_take(place: Place, folder: Path) -> None:
    """Before the repository is made, and before the upload."""
    card = folder / "README.md"
    card.write_text(card.read_text().replace("apache-2.0", "my-own-licence"))
    refused = place.client.push(folder, "alice/licensed")
    assert refused.error == "ValueError" and '"license\\" must be one of' in refused.message
    assert not place.hub.calls(SENDING) and "alice/licensed" not in place.hub.store.repos


def test_the_hub_forbids_what_the_token_seemed_to_allow(place: Place, folder: Path) -> None:
    """A fine-grained token: whoami does not say what it may do. 403 on each call that writes."""
    for number, call in enumerate(("POST /api/repos/create", "POST .*/preupload/", "POST .*/commit/")):
        place.hub.mend()
        place.hub.fail(call, status=403, times=10**6)
        failed = place.client.push(folder, f"alice/forbidden-{number}")
        assert failed.error == "PushError" and failed.landed is False and "403 Forbidden" in failed.message
        assert "as it was" in failed.message and len(place.hub.calls(call)) == 1  # not tried again
        assert (
            place.hub.store.repos.get(f"alice/forbidden-{number}") is None
            or len(place.hub.history(f"alice/forbidden-{number}")) == 1
        )


def test_the_command_line(place: Place, folder: Path) -> None:
    """The exit status says what the Hub holds: 0 the folder, 1 what it held, 3 a commit without its tag, 4 nobody knows."""
    hub = place.hub

    def trimllm(*line: str) -> SimpleNamespace:
        return place.client.call("trimllm", line=["push", str(folder), *line])

    done = trimllm("alice/typed", "--private", "--json")
    assert done.code == 0, done
    plain = json.loads(done.out)
    assert (plain["new"], plain["tag"], plain["commit"]) == (True, "trim-4of6", hub.refs("alice/typed")["refs/heads/main"])
    assert plain["files"]["README.md"] == (folder / "README.md").stat().st_size and "optimizer.pt" in plain["left_out"]
    assert hub.store.repos["alice/typed"]["private"]
    shown = trimllm("alice/typed", "--private")
    assert shown.code == 0 and shown.out.startswith(f"no new commit: {hub.url}/alice/typed/commit/{plain['commit']}, tag")
    assert trimllm("bob/typed").code == 1
    assert trimllm().code == 2
    hub.fail("POST .*/tag/", status=403)
    tagless = trimllm("alice/typed", "--tag", "v1", "--json")
    assert tagless.code == 3 and json.loads(tagless.out)["landed"] is True and "tag v1 is not set" in tagless.errors
    hub.fail("POST .*/commit/", status=403)
    assert trimllm("alice/refused").code == 1
    told = trimllm("acme/told").out
    assert "model-00001" in told and "left out: checkpoint-3/, optimizer.pt" in told
    assert f"new commit: {hub.url}/acme/told/commit/" in told  # in one piece
    pulled = trimllm("acme/asked", "--create-pr", "--json")
    assert json.loads(pulled.out)["pull_request"] == "refs/pr/1" and "refs/tags/trim-4of6" not in hub.refs("acme/asked")
    assert trimllm("alice/by-hand", "--revision", "trimmed", "--no-tag", "--message", "By hand").code == 0
    assert list(hub.refs("alice/by-hand")) == ["refs/heads/main", "refs/heads/trimmed"]
    assert hub.history("alice/by-hand", "trimmed")[0] == "By hand"
    hub.fail("POST .*/commit/", lose_reply=True, then_down=True)
    unknown = trimllm("alice/unknown", "--json")
    assert unknown.code == 4 and json.loads(unknown.out)["landed"] is None
