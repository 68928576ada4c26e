"""Card validation, how a file is to be sent, and commits."""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re

from .card_rules import card_problems
from .server import MODEL, Request, owns, route
from .store import Json, Refused, Store, blob_id, now
from .xet_storage import fetch

LARGEST_SMALL_FILE = 10 << 20


@route("POST", "/api/validate-yaml")
def validate(request: Request) -> None:
    errors, warnings, _ = card_problems(request.json()["content"])
    told = {"errors": [{"message": x} for x in errors], "warnings": [{"message": x} for x in warnings]}
    request.reply(400 if errors else 200, told)


@route("POST", MODEL + "/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, repo_id: str, revision: str) -> None:
    store = request.hub.store
    _, files = store.files(request.repo(repo_id, write=True, to_pull=is_pull(revision)), revision)
    ignored = store.content(files[".gitignore"]).decode().split() if ".gitignore" in files else []
    told = []
    for asked in request.json()["files"]:
        path = asked["path"]
        large = is_large(store, files, path, asked["size"], base64.b64decode(asked.get("sample") or ""))
        old = files.get(path)
        told.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                **({"oid": old.get("lfs") or old["oid"]} if old else {}),
            }
        )
    request.reply(200, {"files": told})


def is_large(store: Store, files: dict[str, Json], path: str, size: int, sample: bytes) -> bool:
    attributes = store.content(files[".gitattributes"]).decode() if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    if size > LARGEST_SMALL_FILE or any(fnmatch.fnmatch(os.path.basename(path), pattern) for pattern in patterns):
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 4  # else it is cut within a letter
    return b"\0" in sample


def is_pull(revision: str) -> bool:
    return re.fullmatch(r"refs/pr/\d+", revision) is not None


@route("POST", MODEL + "/commit/(?P<revision>[^/]+)")
def commit(request: Request, repo_id: str, revision: str) -> None:
    store, repo, user = request.hub.store, request.repo(repo_id, write=True, to_pull=is_pull(revision)), request.user()
    assert user is not None
    if is_pull(revision) and not owns(user, repo_id.split("/")[0]):
        if repo["pulls"][int(revision.split("/")[2]) - 1]["author"]["name"] != user["name"]:
            raise Refused(403, "Forbidden: not your pull request")
    head, *operations = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    for operation in operations:
        if operation["key"] == "lfsFile":
            fetch(request, operation["value"]["oid"], operation["value"]["size"])
    with store.lock:
        at, files = store.files(repo, revision)
        if not at.startswith(head["value"].get("parentCommit") or ""):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = changed(store, files, operations)
        title, ref = head["value"]["summary"], revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        number = None
        if "create_pr" in request.query:
            number = len(repo["pulls"]) + 1
            repo["pulls"].append(
                {
                    "num": number, "title": title, "author": {"name": user["name"]}, "createdAt": now(), "status": "open",
                    "isPullRequest": True, "repo": {"name": repo_id, "type": "model"}, "base": ref,
                }
            )  # fmt: skip
            repo["refs"][f"refs/pr/{number}"], ref = at, f"refs/pr/{number}"
        elif ref not in repo["refs"]:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        oid = store.add_commit(repo, ref, files, title, user["name"])
    address = f"{request.base}/{repo_id}"
    pull = {"pullRequestUrl": f"{address}/discussions/{number}"} if number else {}
    request.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}", "hookOutput": "", **pull})


def changed(store: Store, files: dict[str, Json], operations: list[Json]) -> dict[str, Json]:
    files = dict(files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
            raise Refused(400, "bad path " + path)
        if kind == "file":
            data = base64.b64decode(value["content"])
            if len(data) > LARGEST_SMALL_FILE:
                raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
            if path == "README.md" and (errors := card_problems(data.decode())[0]):
                raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
            files[path] = store.put_blob(data)
        elif kind == "lfsFile":
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n".encode()
            )
            files[path] = {
                "oid": blob_id(pointer), "size": value["size"], "lfs": value["oid"], "pointer_size": len(pointer),
                "xet": store.xet_of.get(value["oid"]),
            }  # fmt: skip
        elif kind == "deletedFile" and files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    return files
