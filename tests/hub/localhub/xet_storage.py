"""Large files by Xet: tokens and the content-addressed store of xorbs, shards and reconstructions."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import time
from typing import Any

from .lfs import check_signature
from .server import MODEL, Request, route
from .store import Refused

HASH = "(?P<xet_hash>[0-9a-f]{64})"


@route("GET", MODEL + "/xet-(?P<scope>read|write)-token/(?P<revision>[^/]+)")
def token(request: Request, repo_id: str, scope: str, revision: str) -> None:
    if not request.hub.xet:
        raise Refused(404, "Xet is not enabled on this hub")
    request.repo(repo_id, write=scope == "write", content=scope == "read")
    expires, store = int(time.time()) + 3600, f"{request.base}/cas"
    access = signed_token(request, scope, expires)
    headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": access, "X-Xet-Token-Expiration": str(expires)}
    request.reply(200, {"casUrl": store, "exp": expires, "accessToken": access}, headers)


def signed_token(request: Request, scope: str, expires: int) -> str:
    return f"xet:{scope}:{expires}:{request.hub.store.sign(f'{scope}{expires}')}"


def check_token(request: Request, scope: str) -> None:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").split(":")
    if len(given) != 4 or given[3] != request.hub.store.sign(given[1] + given[2]) or int(given[2]) < time.time():
        raise Refused(401, "bad xet token")
    if scope == "write" and given[1] != "write":
        raise Refused(403, "the xet token has not the scope")


@route("POST", f"/cas/v1/xorbs/default/{HASH}")
def put_xorb(request: Request, xet_hash: str) -> None:
    check_token(request, "write")
    file = request.hub.store.root / "xorbs" / xet_hash
    new = not file.exists()
    file.write_bytes(request.body())
    request.reply(200, {"was_inserted": new})


def as_hex(data: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


@route("POST", "/cas/v1/shards")
def put_shard(request: Request) -> None:
    """A shard's file section: for each file the pieces of xorbs that it is made of, and its sha256."""
    check_token(request, "write")
    store, data, at = request.hub.store, request.body(), 48
    with store.lock:
        while data[at : at + 32] != b"\xff" * 32:
            file_hash = as_hex(data[at : at + 32])
            flags, pieces = struct.unpack_from("<II", data, at + 32)
            at += 48
            made_of = []
            for _ in range(pieces):
                xorb = as_hex(data[at : at + 32])
                _, size, first, last = struct.unpack_from("<IIII", data, at + 32)
                if not (store.root / "xorbs" / xorb).exists():
                    raise Refused(400, "the shard names a xorb that was never uploaded")
                made_of.append((xorb, size, first, last))
                at += 48
            at += 48 * pieces * bool(flags >> 31)
            store.xet_files[file_hash] = made_of
            if flags >> 30 & 1:
                store.xet_of[as_hex(data[at : at + 32])] = file_hash
                at += 48
    request.reply(200, {"result": 1})


def chunks(xorb: bytes) -> list[tuple[int, int]]:
    """Where a xorb's chunks begin and end."""
    found, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        end = at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        found.append((at, end))
        at = end
    return found


@route("GET", f"/cas/v1/reconstructions/{HASH}")
def reconstruct(request: Request, xet_hash: str) -> None:
    """Which chunks of which xorbs make a range of a file."""
    check_token(request, "read")
    store = request.hub.store
    if xet_hash not in store.xet_files:
        raise Refused(404, "no such file")
    made_of = store.xet_files[xet_hash]
    total = sum(size for _, size, _, _ in made_of)
    first, end = 0, total
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        first, end = int(match[1]), min(int(match[2]) + 1 if match[2] else total, total)
        if first >= total:
            raise Refused(416, "range past the end")
    terms: list[Any] = []
    addresses: dict[str, Any] = {}
    at, start = 0, None
    for xorb, size, a, z in made_of:
        if at + size > first and at < end:
            start = at if start is None else start
            terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": a, "end": z}})
            places = chunks((store.root / "xorbs" / xorb).read_bytes())
            there = {
                "range": {"start": a, "end": z},
                "url": f"{request.base}/cas/xorb/{xorb}?sig={store.sign(xorb)}",
                "url_range": {"start": places[a][0], "end": places[z - 1][1] - 1},
            }
            if there not in addresses.setdefault(xorb, []):
                addresses[xorb].append(there)
        at += size
    offset = first - (start or 0)
    request.reply(200, {"offset_into_first_range": offset, "terms": terms, "fetch_info": addresses})


@route("GET", f"/cas/xorb/{HASH}")
def get_xorb(request: Request, xet_hash: str) -> None:
    check_signature(request, xet_hash)
    data = (request.hub.store.root / "xorbs" / xet_hash).read_bytes()
    request.reply_range(data, {"Content-Type": "application/octet-stream"})


def fetch(request: Request, sha: str, size: int) -> None:
    """Make sure that the bytes of a committed pointer are here: uploaded by LFS, or rebuilt from Xet and checked."""
    store = request.hub.store
    file = store.root / "lfs" / sha
    if not file.exists() and sha in store.xet_of:
        import hf_xet

        rebuilt, expires = store.root / "parts" / f"{sha}.xet", int(time.time()) + 600
        access = signed_token(request, "read", expires)
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"{request.base}/cas", token=access, token_expiry_unix_secs=expires
        )
        with group as downloads:
            downloads.start_download_file(hf_xet.XetFileInfo(store.xet_of[sha], size), str(rebuilt))
        if hashlib.sha256(rebuilt.read_bytes()).hexdigest() != sha:
            raise Refused(400, "the file rebuilt from Xet does not hash to its oid")
        os.replace(rebuilt, file)
    if not file.exists() or file.stat().st_size != size:
        raise Refused(400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {sha}")
