"""Large files by git-LFS, whole or in parts, and their download."""

from __future__ import annotations

import hashlib
from typing import Any

from .server import REPO, Request, route
from .store import Refused

SHA = "(?P<sha>[0-9a-f]{64})"


@route("POST", f"/{REPO}.git/info/lfs/objects/batch")
def batch(request: Request, repo_id: str) -> None:
    store, part = request.hub.store, request.hub.part
    request.repo(repo_id, write=True, to_pull=True)  # the author of a pull request sends bytes before there is one
    asked, told = request.json(), []
    for wanted in asked["objects"]:
        sha, size = wanted["oid"], wanted["size"]
        found: dict[str, Any] = {"oid": sha, "size": size}
        if not (store.root / "lfs" / sha).exists():
            there, signature = f"{request.base}/lfs/{sha}", f"?sig={store.sign(sha)}"
            upload: dict[str, Any] = {"href": there + signature}
            if "multipart" in asked["transfers"] and size > part:
                parts = {str(i): f"{there}/{i}{signature}" for i in range(1, -(-size // part) + 1)}
                upload = {"href": f"{there}/complete{signature}", "header": {"chunk_size": str(part), **parts}}
            found["actions"] = {"upload": upload, "verify": {"href": f"{there}/verify{signature}"}}
        told.append(found)
    content_type = {"Content-Type": "application/vnd.git-lfs+json"}
    request.reply(200, {"transfer": "basic", "objects": told}, content_type)


def check_signature(request: Request, sha: str) -> None:
    if request.query.get("sig") != [request.hub.store.sign(sha)]:
        raise Refused(403, "SignatureDoesNotMatch")


@route("PUT", rf"/lfs/{SHA}(?:/(?P<part>\d+))?")
def put(request: Request, sha: str, part: str | None = None) -> None:
    check_signature(request, sha)
    root, data = request.hub.store.root, request.body()
    if part is None and hashlib.sha256(data).hexdigest() != sha:
        raise Refused(400, "XAmzContentSHA256Mismatch")
    (root / (f"lfs/{sha}" if part is None else f"parts/{sha}.{part}")).write_bytes(data)
    request.reply(200, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, raw=b"")


@route("POST", f"/lfs/{SHA}/complete")
def complete(request: Request, sha: str) -> None:
    check_signature(request, sha)
    root = request.hub.store.root
    data = b"".join((root / f"parts/{sha}.{part['partNumber']}").read_bytes() for part in request.json()["parts"])
    if hashlib.sha256(data).hexdigest() != sha:
        raise Refused(400, "the parts do not hash to their oid")
    (root / "lfs" / sha).write_bytes(data)
    request.reply(200, {})


@route("POST", f"/lfs/{SHA}/verify")
def verify(request: Request, sha: str) -> None:
    file = request.hub.store.root / "lfs" / sha
    if not file.exists() or file.stat().st_size != request.json()["size"]:
        raise Refused(404, "LFS object not found or of another size")
    request.reply(200, {})


@route("GET", f"/cdn/{SHA}")
def download(request: Request, sha: str) -> None:
    check_signature(request, sha)
    data = (request.hub.store.root / "lfs" / sha).read_bytes()
    request.reply_range(data, {"ETag": f'"{sha}"', "Content-Type": "application/octet-stream"})
