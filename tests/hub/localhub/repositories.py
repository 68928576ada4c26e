"""Accounts, repositories, their references and pull requests, and reading what they hold."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any
from urllib.parse import quote

from .card_rules import card_problems
from .server import MODEL, REPO, Request, owns, route
from .store import Json, Refused


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> None:
    user: Any = request.user(required=True)
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user["orgs"]]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
    request.reply(200, {"type": "user", "id": user["name"], "name": user["name"], "orgs": orgs, "auth": token})


@route("POST", "/api/repos/create")
def create(request: Request) -> None:
    user: Any = request.user(required=True)
    asked, store = request.json(), request.hub.store
    namespace = asked.get("organization") or user["name"]
    if user["role"] != "write" or not owns(user, namespace):
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if not re.fullmatch(r"\w[\w.-]{0,95}", asked["name"]) or ".." in asked["name"] or "--" in asked["name"]:
        raise Refused(400, "Invalid repo name: " + asked["name"])
    repo_id = f"{namespace}/{asked['name']}"
    with store.lock:
        if repo_id in store.repos:
            return request.reply(409, {"error": "You already created this model repo", "url": f"{request.base}/{repo_id}"})
        store.new_repo(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")), user["name"])
    request.reply(200, {"url": f"{request.base}/{repo_id}", "name": repo_id, "id": secrets.token_hex(12)})


@route("PUT", MODEL + "/settings")
def settings(request: Request, repo_id: str) -> None:
    repo, asked = request.repo(repo_id, write=True), request.json()
    if "visibility" in asked:
        repo["private"] = asked["visibility"] == "private"
    repo["gated"] = asked.get("gated", repo["gated"])
    request.reply(200, {"private": repo["private"], "gated": repo["gated"]})


@route("POST", MODEL + "/user-access-request/grant")
def grant(request: Request, repo_id: str) -> None:
    request.repo(repo_id, write=True)["access"].append(request.json()["user"])
    request.reply(200, {})


@route("GET", MODEL)
@route("GET", MODEL + "/revision/(?P<revision>[^/]+)")
def info(request: Request, repo_id: str, revision: str = "main") -> None:
    repo, store = request.repo(repo_id), request.hub.store
    oid, files = store.files(repo, revision)
    card = card_problems(store.content(files["README.md"]).decode())[2] if "README.md" in files else {}
    found = {
        "_id": "0", "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": oid,
        "private": repo["private"], "gated": repo["gated"], "disabled": False, "downloads": 0, "likes": 0,
        "tags": card.get("tags") or [], "siblings": [{"rfilename": name} for name in sorted(files)], "cardData": card,
    }  # fmt: skip
    found |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    request.reply(200, found)


@route("GET", MODEL + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(request: Request, repo_id: str, revision: str, path: str | None = None) -> None:
    oid, files = request.hub.store.files(request.repo(repo_id), revision)
    prefix = f"{path.strip('/')}/" if path else ""
    inside = {name: file for name, file in files.items() if name.startswith(prefix)}
    if prefix and not inside:
        raise Refused(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
    deep = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    folders, entries = set(), []
    for name, file in sorted(inside.items()):
        above = name.removeprefix(prefix).split("/")[:-1]
        folders.update(prefix + "/".join(above[: depth + 1]) for depth in range(len(above) if deep else min(1, len(above))))
        if deep or not above:
            entries.append(entry(name, file))
    entries += [{"type": "directory", "oid": hashlib.sha1(x.encode()).hexdigest(), "size": 0, "path": x} for x in folders]
    request.reply(200, entries, {"X-Repo-Commit": oid})


def entry(name: str, file: Json) -> Json:
    found = {"type": "file", "oid": file["oid"], "size": file["size"], "path": name}
    if file.get("lfs"):
        found["lfs"] = {"oid": file["lfs"], "size": file["size"], "pointerSize": file["pointer_size"]}
    if file.get("xet"):
        found["xetHash"] = file["xet"]
    return found


# ---- branches and tags


@route("GET", MODEL + "/refs")
def refs(request: Request, repo_id: str) -> None:
    held = request.repo(repo_id)["refs"]

    def under(prefix: str) -> list[Json]:
        return [
            {"name": k.removeprefix(prefix), "ref": k, "targetCommit": v} for k, v in held.items() if k.startswith(prefix)
        ]

    pulls = {"pullRequests": under("refs/pr/")} if "include_prs" in request.query else {}
    request.reply(200, {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": [], **pulls})


@route("POST", MODEL + "/(?P<kind>tag|branch)/(?P<name>[^/]+)")
def add_reference(request: Request, repo_id: str, kind: str, name: str) -> None:
    repo, asked = request.repo(repo_id, write=True), request.json()
    at = name if kind == "tag" else asked.get("startingPoint", "main")
    ref = f"refs/tags/{asked['tag']}" if kind == "tag" else f"refs/heads/{name}"
    if ref in repo["refs"]:
        raise Refused(409, f"Reference exists already: {ref}")
    repo["refs"][ref] = request.hub.store.commit_of(repo, at)
    request.reply(201, {})


@route("DELETE", MODEL + "/(?P<kind>tag|branch)/(?P<name>[^/]+)")
def delete_reference(request: Request, repo_id: str, kind: str, name: str) -> None:
    refs = request.repo(repo_id, write=True)["refs"]
    if refs.pop(f"refs/{'tags' if kind == 'tag' else 'heads'}/{name}", None) is None:
        raise Refused(404, "Invalid rev id: " + name, "RevisionNotFound")
    request.reply(200, {})


# ---- pull requests


@route("GET", MODEL + "/discussions")
def pulls(request: Request, repo_id: str) -> None:
    """All on one page; a pull request is an issue with a branch, and the tests know no plain issues."""
    author = request.query.get("author", [None])[0]
    found = [pull for pull in request.repo(repo_id)["pulls"] if author in (None, pull["author"]["name"])]
    request.reply(200, {"discussions": found, "count": len(found), "start": 0})


@route("POST", MODEL + r"/discussions/(?P<number>\d+)/merge")
def merge(request: Request, repo_id: str, number: str) -> None:
    repo = request.repo(repo_id, write=True)
    pull = repo["pulls"][int(number) - 1]
    repo["refs"][pull["base"]] = repo["refs"][f"refs/pr/{number}"]
    pull["status"] = "merged"
    request.reply(200, {"newStatus": "merged"})


# ---- downloads


@route("GET", f"/{REPO}" + r"/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)")
def resolve(request: Request, repo_id: str, revision: str, path: str) -> None:
    store, repo = request.hub.store, request.repo(repo_id, content=True)
    oid, files = store.files(repo, revision)
    headers, file = {"X-Repo-Commit": oid}, files.get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    if not file.get("lfs"):  # as the Hub does: on to an address that may be cached
        there = f"/api/resolve-cache/models/{repo_id}/{oid}/{quote(path)}"
        return request.reply(307, headers={**headers, "ETag": f'"{file["oid"]}"', "Location": there}, raw=b"")
    sha = file["lfs"]
    elsewhere = request.base.replace("127.0.0.1", "localhost")  # another host: the token must not go there
    headers |= {
        "X-Linked-Size": str(file["size"]), "X-Linked-Etag": f'"{sha}"',
        "Location": f"{elsewhere}/cdn/{sha}?sig={store.sign(sha)}",
    }  # fmt: skip
    if file.get("xet") and request.hub.xet:
        token = f"{request.base}/api/models/{repo_id}/xet-read-token/{oid}"
        plan = f"{request.base}/cas/v1/reconstructions/{file['xet']}"
        headers |= {"X-Xet-Hash": file["xet"], "Link": f'<{token}>; rel="xet-auth", <{plan}>; rel="xet-reconstruction-info"'}
    request.reply(302, headers=headers, raw=b"")


@route("GET", f"/api/resolve-cache/models/{REPO}/(?P<oid>[^/]+)/(?P<path>.+)")
def resolve_cache(request: Request, repo_id: str, oid: str, path: str) -> None:
    store = request.hub.store
    file = store.files(request.repo(repo_id, content=True), oid)[1].get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
    request.reply_range(
        store.content(file), {"X-Repo-Commit": oid, "ETag": f'"{file["oid"]}"', "Content-Type": "text/plain"}
    )
