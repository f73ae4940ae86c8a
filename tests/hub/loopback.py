"""Hubs on loopback that speak the protocols of Hugging Face and modelers.cn, well or badly, as a test wants it.

What they answer follows what huggingface_hub 2.4.0 and openmind_hub 1.3.0 ask for and read.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

FOREVER = 1 << 30


def git_sha1(data: bytes) -> str:
    """The name git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository. `main` and its commit are the only revisions unless more are given.

    Attributes:
        files: content by path.
        listed: entries that replace what is listed by default, by path: {"size": ..., "oid": ..., "type": ...}.
    """

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: list[dict[str, Any]] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", self.commit):
            return self.commit, self.files
        for name, files in self.revisions.items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class Fault:
    """What goes wrong with the next `times` downloads of a file.

    Kinds: cut (connection reset after `at` bytes), truncate (a shorter body, honestly announced), longer (a length
    header `at` too large), shorter (one too small), wrong (the byte at `at` is another), status, stall (silence after
    `at` bytes), more (a body longer than the file), whole (ignores ranges), echo (an error that repeats the token).
    """

    kind: str
    at: int = 0
    times: int = 1
    status: int = 500
    retry_after: str | None = None


class LoopbackServer(ThreadingHTTPServer):
    """Base of both: repositories, faults, and a record of every request."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, handler: type[Handler], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.tokens: set[str] = set()
        self.created: dict[str, dict[str, Any]] = {}
        self.storage: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.redirect: str | None = None  # where downloads of large files are sent
        self.page_size = 3
        self.lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def next_fault(self, key: str) -> Fault | None:
        with self.lock:
            for fault in self.faults.get(key, []):
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def sent(self, part: str) -> list[tuple[str, str, dict[str, str]]]:
        """The requests whose path has `part`."""
        with self.lock:
            return [request for request in self.requests if part in request[1]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.path.startswith("http://"):  # asked as a proxy
            parts = urlsplit(self.path)
            self.path = parts.path + (f"?{parts.query}" if parts.query else "")
        with self.server.lock:
            self.server.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        return True

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.server.tokens

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """End the connection the hard way."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def serve_bytes(self, data: bytes, key: str, headers: dict[str, str]) -> None:
        """A file or the range asked for, with the fault that is due."""
        fault = self.server.next_fault(key) if self.command == "GET" else None
        kind = fault.kind if fault else ""
        at = fault.at if fault else 0
        if fault and kind == "status":
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self.answer(fault.status, {"error": "busy"}, extra)
        if fault and kind == "echo":
            return self.answer(fault.status, {"error": f"you sent {self.headers.get('Authorization')}"})
        start, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and kind != "whole":
            start, status = int(asked[1]), 206
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        content = memoryview(data)[start:]
        if kind == "wrong":
            changed = bytearray(content)
            changed[at % len(changed)] ^= 0x55
            content = memoryview(changed)
        elif kind == "truncate":
            content = content[: at % max(1, len(content))]
        elif kind == "more":
            content = memoryview(bytes(content) + b"x" * (at + 1))
        length = len(content)
        if kind == "longer":
            length += at + 1
        elif kind == "shorter":
            length = max(0, length - at - 1)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if kind in ("cut", "stall"):
            self.connection.sendall(content[: at % max(1, len(content))])
            if kind == "stall":
                self.server.closing.wait(60)
            return self.reset()
        self.connection.sendall(content[: length if kind == "shorter" else None])
        if kind in ("longer", "more"):
            self.close_connection = True
        return None


# ---------------------------------------------------------------- Hugging Face


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".gguf", ".pt", ".onnx"))


def failure(code: str) -> dict[str, str]:
    """The headers in which Hugging Face says what is wrong."""
    return {"X-Error-Code": code, "X-Error-Message": f"{code}: no luck"}


class HuggingFaceHandler(Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/storage/"):
            return self._storage(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._api(found[1], found[2] or "", parse_qs(query))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        return self.answer(404, {"error": "not found"})

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.authorized):
            bad = "Authorization" in self.headers and not self.authorized
            if bad:
                self.answer(401, {"error": "bad"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
            else:
                code = 404 if self.authorized else 401
                self.answer(code, {"error": "x"}, failure("RepoNotFound"))
            return None
        return repo

    def _gate(self, repo: Repo) -> bool:
        if not repo.gated or self.authorized:
            return True
        status = 403 if "Authorization" in self.headers else 401
        self.answer(status, {"error": "gated"}, failure("GatedRepo"))
        return False

    def _api(self, name: str, rest: str, query: dict[str, list[str]]) -> None:
        if fault := self.server.next_fault(f"{name}/api"):
            if fault.kind == "echo":
                return self.answer(fault.status, {"error": f"you sent {self.headers.get('Authorization')}"})
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self.answer(fault.status, {"error": "busy"}, extra)
        repo = self._repo(name)
        if repo is None:
            return None
        if rest == "/auth-check":
            return self.answer(200, {}) if self._gate(repo) else None
        if rest.startswith("/tree/"):
            revision = unquote(rest.removeprefix("/tree/").partition("/")[0])
        else:
            revision = unquote(rest.removeprefix("/revision/")) or "main"
        at = repo.at(revision)
        if at is None:
            return self.answer(404, {"error": "x"}, failure("RevisionNotFound"))
        commit, files = at
        if not rest.startswith("/tree/"):
            info = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": [], "tags": []}
            return self.answer(200, info | {"gated": "auto" if repo.gated else False})
        entries = hf_tree(files, repo)
        first = int(query.get("cursor", ["0"])[0])
        last = first + self.server.page_size
        headers = {}
        if last < len(entries):
            host = self.headers["Host"]
            headers["Link"] = f'<http://{host}{self.path.partition("?")[0]}?recursive=true&cursor={last}>; rel="next"'
        return self.answer(200, entries[first:last], headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None or not self._gate(repo):
            return None
        at = repo.at(revision)
        if at is None:
            return self.answer(404, b"", failure("RevisionNotFound"))
        commit, files = at
        if path not in files:
            return self.answer(404, b"", failure("EntryNotFound"))
        data, headers = files[path], {"X-Repo-Commit": commit}
        if is_lfs(path) and self.server.redirect:
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
            location = f"{self.server.redirect}/storage/{quote(f'{name}/{revision}/{path}')}"
            return self.answer(302, b"", headers | {"Location": location})
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_sha1(data)
        return self.serve_bytes(data, f"{name}/{path}", headers | {"ETag": f'"{etag}"'})

    def _storage(self, path: str) -> None:
        org, name, revision, file = unquote(path.removeprefix("/storage/")).split("/", 3)
        at = self.server.repos[f"{org}/{name}"].at(revision)
        assert at is not None
        return self.serve_bytes(at[1][file], f"{org}/{name}/{file}", {"ETag": '"storage"'})


def hf_tree(files: dict[str, bytes], repo: Repo) -> list[dict[str, Any]]:
    """The recursive listing, folders included."""
    folders = {path[:i] for path in files for i, c in enumerate(path) if c == "/"}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders - {""})
    ]
    for path, data in files.items():
        entry: dict[str, Any] = {"type": "file", "oid": git_sha1(data), "size": len(data), "path": path}
        if is_lfs(path):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        if path in repo.listed:
            change = dict(repo.listed[path])
            if "lfs" in entry:
                entry["lfs"] |= {key: change[key] for key in ("oid", "size") if key in change}
            entry |= change
        entries.append(entry)
    return entries + repo.extra


def serve_huggingface(storage: bool = True) -> Iterable[LoopbackServer]:
    """A hub, and unless told otherwise another host for its large files; for a fixture."""
    hub = LoopbackServer(HuggingFaceHandler)
    behind = LoopbackServer(HuggingFaceHandler)
    behind.repos, behind.faults = hub.repos, hub.faults
    if storage:
        hub.redirect = f"http://127.0.0.1:{behind.port}"
    hub.behind = behind  # type: ignore[attr-defined]
    for server in (hub, behind):
        server.start()
    yield hub
    for server in (hub, behind):
        server.stop()
