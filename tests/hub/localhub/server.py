"""The local Hub's server: requests and answers, who may do what, and faults on request."""

from __future__ import annotations

import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .store import Json, Refused, Store

# Tokens and whose they are. bob is alice's organization's guest: he may not write there.
USERS: dict[str, Json] = {
    "hf_alice_may_write": {"name": "alice", "role": "write", "orgs": ["acme"]},
    "hf_alice_may_only_read": {"name": "alice", "role": "read", "orgs": ["acme"]},
    "hf_bob_may_write": {"name": "bob", "role": "write", "orgs": []},
}
Route = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"(?P<repo_id>[^/]+/[^/]+)"
MODEL = f"/api/models/{REPO}"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Let a function answer requests; a pattern's groups are its arguments."""

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches."""

    match: str
    times: int = 1
    status: int = 503  # answer this
    html: bool = False  # as a proxy does, in HTML
    after_bytes: int | None = None  # cut the wire after so many bytes of the body
    lose_reply: bool = False  # do it, and never answer
    then_down: bool = False  # and from then on nothing is answered but 503
    hold: float = 0  # wait so many seconds, then do it as if nothing were wrong
    seen: threading.Event = field(default_factory=threading.Event)


class Request(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.read: bytes | None = None
        self.status, self.lose, self.then_down = 0, False, False
        self.base = f"http://{self.headers['Host']}"
        path = parts.path if parts.path.startswith("/api") else unquote(parts.path)
        with self.hub.idle:
            self.hub.answering += 1
        try:
            if not self.goes_wrong(path):
                self.dispatch(path)
        except Refused as error:
            if self.read is None:
                self.body()
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self.reply(error.status, {"error": error.message}, {**headers, **error.headers})
        except ConnectionError:
            self.close_connection = True
        finally:
            with self.hub.idle:
                self.hub.log.append((f"{self.command} {path}", self.status))
                self.hub.answering -= 1
                self.hub.idle.notify_all()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def dispatch(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                return function(self, **{k: unquote(v) if v else v for k, v in match.groupdict().items()})
        raise Refused(404, f"The local Hub has no {self.command} {path}")

    def goes_wrong(self, path: str) -> bool:
        """Whether a fault answers this request."""
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.match, f"{self.command} {path}"):
                fault.times -= 1
                fault.seen.set()
                if fault.lose_reply or fault.hold:
                    self.lose, self.then_down = fault.lose_reply, fault.then_down
                    self.body()
                    time.sleep(fault.hold)
                    return False
                if fault.after_bytes is not None:
                    self.rfile.read(min(fault.after_bytes, int(self.headers.get("Content-Length") or fault.after_bytes)))
                    self.hang_up()
                elif fault.html:
                    self.body()
                    page = b"<html>Service Unavailable</html>"
                    self.reply(fault.status, headers={"Content-Type": "text/html"}, raw=page)
                else:
                    self.body()
                    self.reply(fault.status, {"error": "injected"})
                return True
        return False

    def hang_up(self) -> None:
        self.status, self.close_connection = -1, True
        self.connection.shutdown(socket.SHUT_RDWR)

    def pieces(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 1 << 20))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def body(self) -> bytes:
        if self.read is None:
            self.read = b"".join(self.pieces())
        return self.read

    def json(self) -> Json:
        return json.loads(self.body() or b"{}")

    def reply(self, status: int, payload: Any = None, headers: Json | None = None, raw: bytes | None = None) -> None:
        if self.lose:
            if self.then_down:
                self.hub.fail(".", times=10**6)
            return self.hang_up()
        data = raw if raw is not None else b"" if payload is None else json.dumps(payload).encode()
        self.send_response(status)
        length = {"Content-Length": str(len(data)), "X-Request-Id": secrets.token_hex(8)}
        for name, value in {"Content-Type": "application/json; charset=utf-8", **length, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.status = status

    def reply_range(self, data: bytes, headers: Json) -> None:
        headers = {"Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if first > last:
                raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.reply(206, raw=data[first : last + 1], headers=headers)
        self.reply(200, raw=data, headers=headers)

    # ---- who may do what

    def user(self, required: bool = False) -> Json | None:
        given = self.headers.get("Authorization", "")
        if given.startswith("Bearer "):
            if given[7:] not in self.hub.store.users:
                raise Refused(401, "Invalid credentials in Authorization header")
            return self.hub.store.users[given[7:]]
        if required:
            raise Refused(401, "Invalid username or password.")
        return None

    def repo(self, repo_id: str, write: bool = False, content: bool = False, to_pull: bool = False) -> Json:
        """The repository, if this user may see it, read its files, write to it or to a pull request against it."""
        user, repo = self.user(), self.hub.store.repos.get(repo_id)
        member = owns(user, repo_id.split("/")[0])
        if repo is None or (repo["private"] and not member):
            # The Hub hides from strangers whether it is missing or private.
            raise Refused(
                *((404, "Repository not found") if user else (401, "Invalid username or password.")), "RepoNotFound"
            )
        if content and repo["gated"] and not member and (user is None or user["name"] not in repo["access"]):
            message = f"Access to model {repo_id} is restricted. "
            if user is None:
                raise Refused(401, f"{message}You must be authenticated to access it. Please log in.", "GatedRepo")
            raise Refused(403, f"{message}Visit {self.base}/{repo_id} to ask for access.", "GatedRepo")
        if write:
            if user is None:
                raise Refused(401, "Invalid username or password.")
            if user["role"] != "write":
                raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
            if not member and not to_pull and "create_pr" not in self.query:
                raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo


def owns(user: Json | None, namespace: str) -> bool:
    return user is not None and (user["name"] == namespace or namespace in user["orgs"])


class LocalHub:
    """A running Hub.

    Args:
        root: Where it keeps bytes.
        xet: Whether it offers Xet; LFS it always does.
        part: Bytes of one part of an LFS multipart upload.
    """

    def __init__(self, root: Path, xet: bool = True, part: int = 8 << 20) -> None:
        from . import commits, lfs, repositories, xet_storage  # noqa: F401  # their routes

        self.store = Store(root, USERS)
        self.xet, self.part = xet, part
        self.faults: list[Fault] = []
        self.log: list[tuple[str, int]] = []
        self.answering, self.idle = 0, threading.Condition()
        handler = type("HubRequest", (Request,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, match: str, **how: Any) -> Fault:
        """From now on fail requests whose "METHOD /path" matches; see `Fault`."""
        fault = Fault(match, **how)
        self.faults.append(fault)
        return fault

    def mend(self) -> None:
        """Forget faults and the log, once requests whose answer the client has already are in it."""
        self.faults.clear()
        with self.idle:
            self.idle.wait_for(lambda: self.answering == 0, timeout=2)
        self.log.clear()

    def calls(self, match: str) -> list[int]:
        """The statuses of the requests so far whose "METHOD /path" matches."""
        return [status for call, status in self.log if re.search(match, call)]

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of a repository's commits, newest first."""
        repo = self.store.repos[repo_id]
        titles, oid = [], self.store.commit_of(repo, revision)
        while oid:
            titles.append(repo["commits"][oid]["title"])
            oid = repo["commits"][oid]["parent"]
        return titles

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository's files."""
        held = self.store.files(self.store.repos[repo_id], revision)[1]
        return {name: self.store.content(file) for name, file in held.items()}

    def refs(self, repo_id: str) -> dict[str, str]:
        """A repository's branches, tags and pull requests, and where they stand."""
        return dict(self.store.repos[repo_id]["refs"])
