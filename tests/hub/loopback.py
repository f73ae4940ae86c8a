"""Hubs on loopback that speak the protocols of Hugging Face and modelers.cn, well or badly, as a test wants it.

What they answer follows what huggingface_hub 2.4.0 and openmind_hub 1.3.0 ask for and read.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

FOREVER = 1 << 30


def sha256(data: bytes) -> str:
    """In hexadecimal; of a large content only once."""
    if len(data) < 1 << 20:
        return hashlib.sha256(data).hexdigest()
    if id(data) not in _LARGE:
        _LARGE[id(data)] = (data, hashlib.sha256(data).hexdigest())
    return _LARGE[id(data)][1]


_LARGE: dict[int, tuple[bytes, str]] = {}  # holds the content too, so that an id is never used again


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

    Kinds: cut (connection reset after `at` bytes), close (ended in good order after them), truncate (a shorter body,
    honestly announced), longer (a length header `at` too large), shorter (one too small), wrong (the byte at `at` is
    another), status, stall (silence after `at` bytes), more (a body longer than the file), whole (ignores ranges), echo
    (an error that repeats the token), slow. Of answers that are no file, by NAME/api: status, echo, gzip (a few bytes
    that unpack to many, which nobody asked for), huge (200 MB), drip (a byte now and then).
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
        self.handler = handler
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.tokens: set[str] = set()
        self.read_only: set[str] = set()  # repositories that no token may write to
        self.created: dict[str, dict[str, Any]] = {}
        self.storage: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.redirect: str | None = None  # where downloads of large files are sent
        self.page_size = 3
        self.next_page_at: str | None = None
        self.endless = False  # a listing of empty pages, each with a next one
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

    def again(self) -> LoopbackServer:
        """Another server on the port of this one, which has ended."""
        server = type(self)(self.handler, self.port)
        server.repos, server.faults, server.storage = self.repos, self.faults, self.storage
        return server

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

    def misbehave(self, fault: Fault) -> bool:
        """Answer what is no file in a way that no hub should; whether the fault is of that kind."""
        if fault.kind == "gzip":
            self.answer(200, gzip.compress(b" " * (50 << 20)), {"Content-Encoding": "gzip"})
        elif fault.kind in ("huge", "drip"):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(200 << 20))
            self.end_headers()
            with contextlib.suppress(OSError):
                if fault.kind == "huge":
                    for _ in range(200):
                        self.connection.sendall(b" " * (1 << 20))
                while not self.server.closing.wait(0.2):
                    self.connection.sendall(b" ")
            self.close_connection = True
        else:
            return False
        return True

    def store(self) -> None:
        """Take in a large file."""
        data = self.body()
        if fault := self.server.next_fault("put"):
            return self.answer(fault.status, {"error": "refused"})
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "wrong content"})
        self.server.storage[oid] = data
        return self.answer(200, b"", {"ETag": '"e"'})

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
        if kind in ("cut", "close", "stall"):
            self.connection.sendall(content[: at % max(1, len(content))])
            if kind == "close":
                self.close_connection = True
                return None
            if kind == "stall":
                self.server.closing.wait(60)
            return self.reset()
        if kind == "slow":
            for i in range(0, len(content), 1 << 16):
                self.connection.sendall(content[i : i + (1 << 16)])
                time.sleep(0.02)
            return None
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

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.authorized:
            status = 403 if "Authorization" in self.headers else 401
            return self.answer(status, {"error": "no right"}, {"X-Error-Message": "no right to write"})
        if path == "/api/repos/create":
            data = json.loads(body)
            name = f"{data['organization']}/{data['name']}"
            made = {"url": f"{self.server.url}/{name}"}
            if name in self.server.repos:
                return self.answer(409, made | {"error": "You already created this model repo"})
            self.server.created[name] = data
            self.server.repos[name] = Repo({".gitattributes": b"x"}, private=data.get("visibility") == "private")
            return self.answer(200, made)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            base = self.server.redirect or self.server.url
            objects: list[dict[str, Any]] = []
            for wanted in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{base}/put/{wanted['oid']}", "header": {}}}
                objects.append(wanted | ({} if wanted["oid"] in self.server.storage else {"actions": upload}))
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = self.server.repos[found[1]]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repo.files[value["path"]] = self.server.storage[value["oid"]]
            url = f"{self.server.url}/{found[1]}/commit/{repo.commit}"
            return self.answer(200, {"success": True, "commitUrl": url, "commitOid": repo.commit})
        return self.answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        self.store()

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
            if self.misbehave(fault):
                return None
            if fault.kind == "echo":
                return self.answer(fault.status, {"error": f"you sent {self.headers.get('Authorization')}"})
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self.answer(fault.status, {"error": "busy"}, extra)
        repo = self._repo(name)
        if repo is None:
            return None
        if rest == "/auth-check/write":
            readable = name in self.server.read_only
            return self.answer(403, {"error": "forbidden"}) if readable else self.answer(200, {})
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
        if self.server.endless:
            entries, last = [], 0
        if last < len(entries) or self.server.endless:
            base = self.server.next_page_at or f"http://{self.headers['Host']}"
            headers["Link"] = f'<{base}{self.path.partition("?")[0]}?recursive=true&cursor={last}>; rel="next"'
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
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
            location = f"{self.server.redirect}/storage/{quote(f'{name}/{revision}/{path}')}"
            return self.answer(302, b"", headers | {"Location": location})
        etag = sha256(data) if is_lfs(path) else git_sha1(data)
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
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        if path in repo.listed:
            change = dict(repo.listed[path])
            if "lfs" in entry:
                entry["lfs"] |= {key: change[key] for key in ("oid", "size") if key in change}
            entry |= change
        entries.append(entry)
    return entries + repo.extra


def serve_huggingface(storage: bool = True) -> Iterator[LoopbackServer]:
    """A hub, and unless told otherwise another host for its large files; for a fixture."""
    hub = LoopbackServer(HuggingFaceHandler)
    behind = LoopbackServer(HuggingFaceHandler)
    behind.repos, behind.faults, behind.storage = hub.repos, hub.faults, hub.storage
    if storage:
        hub.redirect = f"http://127.0.0.1:{behind.port}"
    hub.behind = behind  # type: ignore[attr-defined]
    for server in (hub, behind):
        server.start()
    yield hub
    for server in (hub, behind):
        server.stop()


# ---------------------------------------------------------------- modelers.cn

MODELERS_HOST = "hub.modelers.cn"
STORAGE_HOST = "files.modelers.cn"


class ModelersHandler(Handler):
    """The REST interface of modelers.cn, as far as openmind_hub uses it."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if path.startswith("/storage/"):
            org, name, revision, file = unquote(path.removeprefix("/storage/")).split("/", 3)
            at = self.server.repos[f"{org}/{name}"].at(revision)
            assert at is not None
            return self.serve_bytes(at[1][file], f"{org}/{name}/{file}", {})
        if found := re.fullmatch(r"/api/v1/file/([^/]+/[^/]+)/([^/]+)/media/(.+)", path):
            return self._media(found[1], found[2], unquote(found[3]))
        if found := re.fullmatch(r"/api/v1/file/([^/]+/[^/]+)", path):
            return self._tree(found[1], asked.get("ref", "main"), asked.get("path", ""))
        if found := re.fullmatch(r"/api/v1/file/([^/]+/[^/]+)/info", path):
            return self._info(found[1], asked.get("ref", "main"), asked.get("path", ""))
        if found := re.fullmatch(r"/api/v1/model/([^/]+)/([^/]+)", path):
            files = self._repo(f"{found[1]}/{found[2]}", asked.get("ref", "main"))
            model: dict[str, Any] = {
                "id": "1",
                "owner": found[1],
                "name": found[2],
                "visibility": "public",
                "labels": {},
            }
            return None if files is None else self.answer(200, {"data": model})
        if path == "/api/v1/user":
            return self.answer(200, {"data": {"account": "org", "email": "a@b.c"}})
        return self.answer(404, {"code": "not_found"})

    def do_POST(self) -> None:
        path, data = self.path.partition("?")[0], json.loads(self.body())
        if path == "/api/v1/file/license_check":
            return self.answer(200, {"data": {"license": "apache-2.0"}})
        if not self.authorized:
            return self.answer(401, {"code": "unauthorized"})
        if path == "/api/v1/model":
            name = f"{data['owner']}/{data['name']}"
            if name in self.server.repos:
                return self.answer(400, {"code": "duplicate_creating"})
            self.server.created[name] = data
            self.server.repos[name] = Repo({}, private=data["visibility"] == "private")
            return self.answer(201, {"data": {}})
        found = re.fullmatch(r"/api/v1/file/([^/]+/[^/]+)/(pre_upload|upload|info/lfs/objects/batch)", path)
        if not found or found[1] not in self.server.repos:
            return self.answer(404, {"code": "not_found"})
        repo, action = self.server.repos[found[1]], found[2]
        if action == "pre_upload":
            files = [{"path": f["path"], "type": "lfs" if is_lfs(f["path"]) else "regular"} for f in data["files"]]
            return self.answer(200, {"data": {"files": files}})
        if action == "upload":
            for file in data["files"]:
                content = base64.b64decode(file["content"])
                if pointer := re.search(rb"oid sha256:([0-9a-f]{64})", content):
                    content = self.server.storage[pointer[1].decode()]
                repo.files[file["path"]] = content
            return self.answer(201, {"data": [{"commit_url": "u", "commit_oid": repo.commit}]})
        return self.answer(200, {"data": {"objects": [self._upload_order(wanted) for wanted in data["objects"]]}})

    def _upload_order(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.server.storage:
            return {"oid": oid, "size": size, "actions": {"parts": [{"index": 1, "etag": "e", "size": size}]}}
        href = f"https://{STORAGE_HOST}/put/{oid}"
        return {"oid": oid, "size": size, "actions": {"parts": [{"index": 1, "href": href, "size": size}]}}

    def do_PUT(self) -> None:
        self.store()

    def _repo(self, name: str, revision: str) -> dict[str, bytes] | None:
        if fault := self.server.next_fault(f"{name}/api"):
            if self.misbehave(fault):
                return None
            if fault.kind == "echo":
                self.answer(fault.status, {"code": f"you sent {self.headers.get('Authorization')}"})
            else:
                extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
                self.answer(fault.status, {"code": "busy"}, extra)
            return None
        repo = self.server.repos.get(name)
        if "Authorization" in self.headers and not self.authorized:
            self.answer(401, {"code": "bad_token"})
        elif repo is None or (repo.private and not self.authorized):
            self.answer(404, {"code": "repo_not_found"})
        elif repo.gated and not self.authorized:
            self.answer(403, {"code": "no_permission"})
        elif (at := repo.at(revision)) is None:
            self.answer(404, {"code": "ref_not_exist"})
        else:
            return at[1]
        return None

    def _tree(self, name: str, revision: str, folder: str) -> None:
        files = self._repo(name, revision)
        if files is None:
            return
        repo = self.server.repos[name]
        at = repo.at(revision)
        assert at is not None
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            rest = path.removeprefix(prefix)
            if "/" in rest.strip("/") and path not in repo.listed:
                below = prefix + rest.partition("/")[0]
                entries[below] = {"type": "dir", "path": below, "name": below, "size": 0}
            else:
                digest = sha256(data) if is_lfs(path) else git_sha1(data)
                entry = {"type": "file", "path": path, "size": len(data), "etag": digest, "is_lfs": is_lfs(path)}
                change = dict(repo.listed.get(path, {}))
                entries[path] = entry | change | ({"etag": change["oid"]} if "oid" in change else {})
        if not folder:
            entries |= {f"extra {i}": modelers_entry(entry) for i, entry in enumerate(repo.extra)}
        commit = {"commit_sha": at[0], "message": "m", "created": "2025-01-01T00:00:00Z"}
        self.answer(200, {"data": {"tree": list(entries.values()), "last_commit": {"commit": commit}}})

    def _info(self, name: str, revision: str, path: str) -> None:
        """One file's metadata, which the client's own download asks for (qtool takes the listing's)."""
        files = self._repo(name, revision)
        if files is None:
            return None
        if path not in files:
            return self.answer(404, {"code": "branch_or_path_not_found"})
        at, data = self.server.repos[name].at(revision), files[path]
        assert at is not None
        digest = sha256(data) if is_lfs(path) else git_sha1(data)
        info = {"path": path, "size": len(data), "etag": digest, "is_lfs": is_lfs(path), "branch_last_commit": at[0]}
        return self.answer(200, {"data": info})

    def _media(self, name: str, revision: str, path: str) -> None:
        files = self._repo(name, revision)
        if files is None:
            return None
        if path not in files:
            return self.answer(404, {"code": "branch_or_path_not_found"})
        if is_lfs(path) and self.server.redirect:
            location = f"{self.server.redirect}/storage/{quote(f'{name}/{revision}/{path}')}"
            return self.answer(302, b"", {"Location": location})
        return self.serve_bytes(files[path], f"{name}/{path}", {})


def modelers_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `Repo.extra`, which is in Hugging Face's words, in modelers.cn's."""
    lfs = entry.get("lfs", {})
    kind = {"file": "file", "directory": "dir"}.get(entry["type"], entry["type"])
    digest, size = lfs.get("oid", entry.get("oid", "")), lfs.get("size", entry.get("size", 0))
    return {"type": kind, "path": entry["path"], "size": size, "etag": digest, "is_lfs": bool(lfs)}


class ModelersServer(LoopbackServer):
    """Over TLS, with a certificate for names under modelers.cn."""

    def __init__(self, certificate: str, key: str, port: int = 0) -> None:
        super().__init__(ModelersHandler, port)
        self._files = certificate, key
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)

    def again(self) -> ModelersServer:
        server = ModelersServer(*self._files, self.port)
        server.repos, server.faults, server.storage = self.repos, self.faults, self.storage
        return server

    @property
    def url(self) -> str:
        return f"https://{MODELERS_HOST}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)


class Proxy(LoopbackServer):
    """An HTTP proxy that leads each host name to a port of this machine: the only way that names get here."""

    def __init__(self, ports: dict[str, int]) -> None:
        super().__init__(ProxyHandler)
        self.ports = ports


class ProxyHandler(Handler):
    def do_CONNECT(self) -> None:
        host = self.path.partition(":")[0]
        port = self.server.ports.get(host)  # type: ignore[attr-defined]
        if port is None:
            return self.answer(502)
        try:
            there = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return self.answer(502)
        self.send_response(200, "Connection established")
        self.end_headers()
        self.close_connection = True
        pairs = {self.connection: there, there: self.connection}
        while True:
            ready, _, _ = select.select(list(pairs), [], [], 1)
            for side in ready:
                try:
                    data = side.recv(1 << 18)
                    if not data:
                        there.close()
                        return None
                    pairs[side].sendall(data)
                except OSError:
                    there.close()
                    return None


def make_certificates(folder: Any) -> tuple[str, str, str]:
    """A certificate authority of the tests' own and a certificate for modelers.cn: paths of CA, certificate, key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("qtool tests", "modelers.cn")]
    certificates = []
    for i, (key, name) in enumerate(zip(keys, names, strict=True)):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=i == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if i == 1:
            hosts = ["*.modelers.cn", "modelers.cn", "evil-modelers.cn", "elsewhere.example"]
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False
            )
        certificates.append(builder.sign(keys[0], hashes.SHA256()))
    paths = [folder / name for name in ("ca.pem", "hub.pem", "hub.key")]
    for path, certificate in zip(paths, certificates, strict=False):
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(paths[0]), str(paths[1]), str(paths[2])


def serve_modelers(folder: Any) -> Iterator[tuple[ModelersServer, dict[str, str]]]:
    """A hub, another host for its large files, and the variables with which a process gets there; for a fixture."""
    ca, certificate, key = make_certificates(folder)
    hub, behind = ModelersServer(certificate, key), ModelersServer(certificate, key)
    behind.repos, behind.faults, behind.storage = hub.repos, hub.faults, hub.storage
    hub.redirect = f"https://{STORAGE_HOST}"
    hub.behind = behind  # type: ignore[attr-defined]
    others = {name: behind.port for name in (STORAGE_HOST, "evil-modelers.cn", "elsewhere.example")}
    proxy = Proxy({MODELERS_HOST: hub.port, **others})
    for server in (hub, behind, proxy):
        server.start()
    yield (
        hub,
        {
            "OPENMIND_HUB_ENDPOINT": hub.url,
            "REQUESTS_CA_BUNDLE": ca,
            "HTTPS_PROXY": proxy.url,
            "https_proxy": proxy.url,
            "NO_PROXY": "",
            "no_proxy": "",
        },
    )
    for server in (hub, behind, proxy):
        server.stop()
