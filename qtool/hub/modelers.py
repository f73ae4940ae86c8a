"""modelers.cn, through openmind_hub (1.3.0).

A file comes through the client's `http_get` and not `om_hub_download`: that one keeps a file whose hash is wrong and
returns it the next time, writes only where `HUB_WHITE_LIST_PATHS` allows, and is tried ten times whatever happens.
The hub knows revisions by name, so files are asked for by the revision, and their hashes hold them to the listing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import openmind_hub
import requests
from openmind_hub.plugins.openmind import file_download
from openmind_hub.plugins.openmind.constants import DEFAULT_REQUEST_TIMEOUT, HOSTNAME_WHITE_LIST
from openmind_hub.plugins.openmind.constants import UPLOAD_OBS_HOSTNAME_WHITE_LIST as STORAGE_DOMAINS
from requests.adapters import HTTPAdapter

from qtool.errors import InputError, QtoolError, in_one_line
from qtool.hub.access import PIECE, Hub
from qtool.hub.bounds import Answer, check_encoding
from qtool.hub.guard import Guard
from qtool.hub.listing import Listing, RemoteFile
from qtool.hub.names import MAX_FILES, name_problem
from qtool.hub.patience import Again, StartOver, Stopped
from qtool.hub.sink import Sink
from qtool.version import __version__

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SEND = HTTPAdapter.send
_REVISION = re.compile(r"[A-Za-z0-9_-]{1,100}")  # what the client lets through


class Modelers(Hub):
    """The hub at OPENMIND_HUB_ENDPOINT.

    Raises:
        InputError: the endpoint is at none of the hosts that the client knows.
    """

    name = "modelers"
    one_by_one = True  # the client sends none of several large files when the hub has the first already

    def __init__(self, token: str | None = None) -> None:
        super().__init__(token)
        self.endpoint = openmind_hub.ENDPOINT.rstrip("/")
        self._guard = Guard(self.endpoint, sorted({*HOSTNAME_WHITE_LIST, *STORAGE_DOMAINS}))
        try:
            self._guard.admit(self.endpoint)
        except QtoolError:
            hint = f"openmind-hub knows hosts under {', '.join(HOSTNAME_WHITE_LIST)}."
            where = f"OPENMIND_HUB_ENDPOINT={self.endpoint}"
            raise InputError("not an address of this hub", where=where, hint=hint) from None
        self._api = openmind_hub.OmApi(self.endpoint, token=token)
        self._headers = openmind_hub.build_om_headers(
            token=token, library_name="qtool", library_version=__version__
        ) | {"Accept-Encoding": "identity"}
        file_download.DOWNLOAD_CHUNK_SIZE = PIECE
        self._watch()

    def _watch(self) -> None:
        """Look at every request of this process. The client makes its sessions itself, so below them is the place."""
        hub = self

        def watched(adapter: HTTPAdapter, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
            if hub.stop.is_set():
                raise Stopped
            url = request.url or ""
            hub._guard.admit(url)
            host = urlsplit(url).hostname or ""
            hub.requests.one_more(host)
            request.headers["Accept-Encoding"] = "identity"
            if not hub._guard.trusts(url):
                request.headers.pop("authorization", None)
            kwargs["timeout"] = kwargs.get("timeout") or DEFAULT_REQUEST_TIMEOUT
            response = _SEND(adapter, request, *args, **kwargs)
            try:
                hub.check_busy(response.status_code, response.headers.get("Retry-After"))
                check_encoding(response.headers.get("Content-Encoding"), host)
            except (Again, QtoolError):
                response.close()
                raise
            if not kwargs.get("stream") or response.is_redirect:  # the client streams files, and nothing else
                response.raw = _Bounded(response.raw, Answer(host))
            return response

        HTTPAdapter.send = watched

    def listing(self, repo: str, revision: str | None) -> Listing:
        revision = revision or "main"
        if not _REVISION.fullmatch(revision):
            what = f"no revision of this hub can be called {revision!r}"
            raise InputError(what, where=repo, hint="They have letters, digits, _ and - only.")
        commit = self._api.get_repo_last_commit(repo, revision=revision, token=self.token).oid
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ValueError("no commit")
        if _COMMIT.fullmatch(revision) and revision != commit:
            raise QtoolError(f"asked for commit {revision}, the hub offers {commit[:80]}", where=repo)
        files: list[RemoteFile] = []
        folders: list[str | None] = [None]
        for folder in folders:  # grows meanwhile
            try:
                entries = list(self._api.list_repo_tree(repo, folder, revision=revision, token=self.token))
            except (openmind_hub.EntryNotFoundError, openmind_hub.RepositoryNotFoundError):
                if folder is None:
                    raise
                entries = []
            if folder is not None and not entries:
                files.append(RemoteFile(folder, 0, ""))
            for entry in entries:
                if isinstance(entry, openmind_hub.RepoFile):
                    files.append(RemoteFile(entry.path, entry.size, entry.blob_id))
                elif name_problem(entry.path):
                    files.append(RemoteFile(entry.path, 0, ""))
                elif entry.path not in folders:
                    folders.append(entry.path)
            if len(files) + len(folders) > 2 * MAX_FILES:
                break
        return Listing(self.name, self.endpoint, repo, revision, commit, tuple(files))

    def fetch(self, listing: Listing, file: RemoteFile, sink: Sink) -> None:
        openmind_hub.http_get(
            openmind_hub.om_hub_url(listing.repo, file.path, revision=listing.revision, endpoint=self.endpoint),
            sink,
            resume_size=sink.tell(),
            headers=self._headers,
            expected_size=file.size,
        )

    def create(self, repo: str, private: bool) -> None:
        self._api.create_repo(repo, token=self.token, private=private, exist_ok=True)

    def send(self, repo: str, files: Mapping[str, Path | bytes], message: str) -> None:
        """The client takes a path only from folders it knows, so it gets open files."""
        for path, content in files.items():
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
                self._api.upload_file(
                    path_or_fileobj=stream, path_in_repo=path, repo_id=repo, token=self.token, commit_message=message
                )

    def explain(self, error: Exception) -> Exception | None:
        if isinstance(error, openmind_hub.OmHubHTTPError | requests.HTTPError):
            return self._explain_answer(error)
        if isinstance(error, openmind_hub.OMValidationError):
            return InputError(in_one_line(error), where=self.endpoint)
        if isinstance(error, requests.exceptions.SSLError):
            what = "its certificate can't be verified"
            return QtoolError(what, where=self.endpoint, hint="If the proxy has its own: REQUESTS_CA_BUNDLE=ca.pem")
        if isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError):
            silent = isinstance(error, requests.Timeout)
            return Again("the server does not answer" if silent else "can't be reached, or the connection broke")
        if isinstance(error, requests.exceptions.JSONDecodeError):
            return self.unreadable(error)
        if isinstance(error, RecursionError):  # http_get calls itself each time a connection breaks
            return Again("the connection breaks again and again")
        if isinstance(error, OSError) and "File size check failed" in str(error):
            return Again("the file ends too early")
        if isinstance(error, ValueError | KeyError | TypeError | AttributeError):
            return self.unreadable(error)
        return None

    def _explain_answer(self, error: Exception) -> Exception:
        response = getattr(error, "response", None)
        if response is None:
            return QtoolError("the server refuses", where=self.endpoint)
        status, url = response.status_code, response.url
        found = re.search(r"/api/v1/(?:file|model)/([^/]+/[^/?]+)", url)
        repo = found[1] if found else self.endpoint
        if status == 416:
            return StartOver("the server refuses this range of bytes")
        if not self._guard.trusts(url) and status in (401, 403, 404):
            return Again(f"the storage behind the hub answers {status}")  # signed addresses expire
        if isinstance(error, openmind_hub.RevisionNotFoundError):
            return self.no_revision(repo, parse_qs(urlsplit(url).query).get("ref", [None])[0])
        if isinstance(error, openmind_hub.GatedRepoError):
            return self.unauthorized()
        if status == 403:
            return self.gated(repo)
        if isinstance(error, openmind_hub.RepositoryNotFoundError | openmind_hub.EntryNotFoundError):
            if "/media/" in url:
                return QtoolError("a file that the hub lists is not there", where=url.partition("/media/")[2])
            return self.absent(repo)
        return self.denial(status)


class _Bounded:
    """An answer's bytes as urllib3 hands them out, as long as there are not too many and they come."""

    def __init__(self, inner: Any, answer: Answer) -> None:
        self._inner, self._answer = inner, answer

    def stream(self, amount: int, decode_content: bool | None = None) -> Iterator[bytes]:
        """In one piece: the client puts pieces of 1 kB together in time that grows with their number's square."""
        parts = []
        for data in self._inner.stream(min(amount, 1 << 14), decode_content=decode_content):
            self._answer.take(len(data))
            parts.append(data)
        yield b"".join(parts)

    def read(self, amount: int | None = None, *args: Any, **kwargs: Any) -> bytes:
        parts = []
        while data := self._inner.read(min(amount or PIECE, PIECE), *args, **kwargs):
            self._answer.take(len(data))
            parts.append(data)
            if amount is not None:
                break
        return b"".join(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
