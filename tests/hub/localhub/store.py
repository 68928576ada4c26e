"""What the local Hub holds: repositories with their commits in memory, bytes on disk."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Json = dict[str, Any]

LARGE = (
    "*.7z *.arrow *.bin *.ckpt *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt *.pth "
    "*.safetensors *.tar *.zip *tfevents*"
).split()
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()


class Refused(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Json | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Store:
    """All that outlives a request."""

    def __init__(self, root: Path, users: dict[str, Json]) -> None:
        self.root, self.users, self.lock = root, users, threading.RLock()
        for folder in ("blobs", "lfs", "xorbs", "parts"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Json] = {}
        self.xet_files: dict[str, list[Any]] = {}  # Xet hash -> the pieces of xorbs that make the file
        self.xet_of: dict[str, str] = {}  # sha256 -> Xet hash; claimed by a client, proved when it commits
        self.key = secrets.token_hex(16)

    def sign(self, what: str) -> str:
        return hashlib.sha256((self.key + what).encode()).hexdigest()[:32]

    def put_blob(self, data: bytes) -> Json:
        oid = blob_id(data)
        (self.root / "blobs" / oid).write_bytes(data)
        return {"oid": oid, "size": len(data)}

    def content(self, file: Json) -> bytes:
        return (self.root / ("lfs" if file.get("lfs") else "blobs") / (file.get("lfs") or file["oid"])).read_bytes()

    def commit_of(self, repo: Json, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in repo["refs"]:
                return repo["refs"][name]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid in repo["commits"]:
                if oid.startswith(revision):
                    return oid
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, repo: Json, revision: str) -> tuple[str, dict[str, Json]]:
        oid = self.commit_of(repo, revision)
        return oid, repo["commits"][oid]["files"]

    def add_commit(self, repo: Json, ref: str, files: dict[str, Json], title: str, author: str) -> str:
        parent = repo["refs"].get(ref)
        body = json.dumps([parent, title, author, files, time.time_ns()], sort_keys=True)
        oid = hashlib.sha1(body.encode()).hexdigest()
        repo["commits"][oid] = {"parent": parent, "title": title, "author": author, "date": now(), "files": files}
        repo["refs"][ref] = oid
        return oid

    def new_repo(self, repo_id: str, private: bool, author: str) -> Json:
        repo: Json = {
            "id": repo_id, "private": private, "gated": False, "access": [], "refs": {}, "commits": {}, "pulls": [],
        }  # fmt: skip
        self.add_commit(repo, "refs/heads/main", {".gitattributes": self.put_blob(GITATTRIBUTES)}, "initial commit", author)
        self.repos[repo_id] = repo
        return repo
