"""Hugging Face and its mirrors, through huggingface_hub (2.4).

A file comes through the client's `http_get` and not `hf_hub_download`: that one throws away what it has when it is
interrupted. Plain HTTP also where the hub offers Xet, because only HTTP's ranges continue inside a file.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token, hf_hub_url, set_client_factory
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from qtool.errors import InputError, QtoolError
from qtool.hub.access import PIECE, TIMEOUT, Hub
from qtool.hub.bounds import Answer, check_encoding
from qtool.hub.guard import Guard
from qtool.hub.listing import Listing, RemoteFile
from qtool.hub.names import MAX_FILES
from qtool.hub.patience import Again, StartOver, Stopped
from qtool.hub.sink import Sink
from qtool.version import __version__

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HuggingFace(Hub):
    """The hub at HF_ENDPOINT.

    Args:
        token: None takes the one the client knows (HF_TOKEN, `hf auth login`), if any.
    """

    name = "huggingface"

    def __init__(self, token: str | None = None) -> None:
        super().__init__(token or get_token())
        self.endpoint = constants.ENDPOINT
        given = self.token or False  # None would make the client look for one itself
        self._guard = Guard(self.endpoint)
        self._thread = threading.local()  # whether it asks for a file
        self._api = HfApi(self.endpoint, token=given, library_name="qtool", library_version=__version__)
        self._headers = build_hf_headers(token=given, library_name="qtool", library_version=__version__) | {
            "Accept-Encoding": "identity"
        }
        set_client_factory(self._client)
        constants.DOWNLOAD_CHUNK_SIZE = PIECE

    def _client(self) -> httpx2.Client:
        """What every request goes through; the hooks see each redirect as well."""
        hooks: dict[str, list[Any]] = {"request": [self._check], "response": [self._look_at]}
        return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)

    def _check(self, request: httpx2.Request) -> None:
        if self.stop.is_set():
            raise Stopped
        url = str(request.url)
        self._guard.admit(url)
        self.requests.one_more(request.url.host)
        request.headers["accept-encoding"] = "identity"
        if not self._guard.trusts(url):
            request.headers.pop("authorization", None)
        limits: dict[str, Any] = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: TIMEOUT if limits.get(kind) is None else limits[kind] for kind in ("connect", "read", "write", "pool")
        }

    def _look_at(self, response: httpx2.Response) -> None:
        self.check_busy(response.status_code, response.headers.get("Retry-After"))
        host = response.request.url.host
        check_encoding(response.headers.get("Content-Encoding"), host)
        if response.is_redirect or not getattr(self._thread, "takes_file", False):
            response.stream = _Bounded(response.stream, Answer(host))

    def listing(self, repo: str, revision: str | None) -> Listing:
        info = self._api.model_info(repo, revision=revision, timeout=TIMEOUT)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise ValueError("no commit")
        if revision and _COMMIT.fullmatch(revision) and revision != commit:
            raise QtoolError(f"asked for commit {revision}, the hub offers {commit[:80]}", where=repo)
        if info.gated:
            self._api.auth_check(repo)
        files, folders = [], []
        tree = self._api.list_repo_tree(repo, recursive=True, revision=commit)
        for entry in itertools.islice(tree, 2 * MAX_FILES):
            if isinstance(entry, RepoFile):
                lfs = entry.lfs
                size, digest = (lfs.size, lfs.sha256) if lfs else (entry.size, entry.blob_id)
                files.append(RemoteFile(entry.path, size, digest))
            else:
                folders.append(entry.path)
        inhabited = {str(parent) for file in files for parent in Path(str(file.path)).parents}
        files += [RemoteFile(path, 0, "") for path in folders if path not in inhabited]
        return Listing(self.name, self.endpoint, repo, revision or "main", commit, tuple(files))

    def fetch(self, listing: Listing, file: RemoteFile, sink: Sink) -> None:
        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            limit = constants.MAX_HTTP_DOWNLOAD_SIZE // 10**9
            raise QtoolError(f"larger than {limit} GB, which the hub serves through Xet only", where=file.path)
        self._thread.takes_file = True
        try:
            self._get(listing, file, sink)
        finally:
            self._thread.takes_file = False

    def _get(self, listing: Listing, file: RemoteFile, sink: Sink) -> None:
        http_get(
            hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=self.endpoint),
            sink,  # type: ignore[arg-type]
            resume_size=sink.tell(),
            headers=self._headers,
            expected_size=file.size,
            displayed_filename=file.path,
        )

    def create(self, repo: str, private: bool) -> None:
        self._api.create_repo(repo, private=private, exist_ok=True)

    def claim(self, repo: str, private: bool) -> None:
        super().claim(repo, private)
        self._api.auth_check(repo, write=True)

    def send(self, repo: str, files: Mapping[str, Path | bytes], message: str) -> None:
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        self._api.create_commit(repo, operations, commit_message=message)

    def explain(self, error: Exception) -> Exception | None:
        if isinstance(error, errors.HfHubHTTPError):
            return self._explain_answer(error)
        if isinstance(error, errors.HFValidationError):
            return InputError(str(error).splitlines()[0], hint="A repository is given as ORG/NAME.")
        if isinstance(error, httpx2.TransportError | httpx2.DecodingError):
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                what = "its certificate can't be verified"
                return QtoolError(what, where=self.endpoint, hint="If the proxy has its own: SSL_CERT_FILE=ca.pem")
            return Again(_transport(error))
        if isinstance(error, httpx2.TooManyRedirects | httpx2.InvalidURL | httpx2.UnsupportedProtocol):
            return QtoolError(f"the hub redirects to no valid address: {type(error).__name__}", where=self.endpoint)
        if isinstance(error, RecursionError):  # http_get calls itself each time a connection breaks
            return Again("the connection breaks again and again")
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            return Again("the file ends too early")
        if isinstance(error, ValueError | KeyError | TypeError | AttributeError):
            return self.unreadable(error)
        return None

    def _explain_answer(self, error: errors.HfHubHTTPError) -> Exception:
        response = error.response
        status, url = response.status_code, str(response.request.url)
        repo = str(getattr(error, "repo_id", None) or "")
        if status == 416:
            return StartOver("the server refuses this range of bytes")
        if not self._guard.trusts(url) and status in (401, 403, 404):
            return Again(f"the storage behind the hub answers {status}")  # signed addresses expire
        if isinstance(error, errors.GatedRepoError):
            return self.gated(repo)
        if isinstance(error, errors.RepositoryNotFoundError):
            return self.absent(repo)
        if isinstance(error, errors.RevisionNotFoundError):
            return self.no_revision(repo, unquote(url.rpartition("/revision/")[2].partition("?")[0]) or None)
        if isinstance(error, errors.DisabledRepoError):
            return InputError("the hub has disabled this repository", where=repo)
        if isinstance(error, errors.EntryNotFoundError):
            return QtoolError("a file that the hub lists is not there", where=url.rpartition("/resolve/")[2])
        if status == 403:
            return InputError("this token may not do that", where=repo or self.endpoint)
        return self.denial(status)


class _Bounded(httpx2.SyncByteStream):
    """An answer's bytes, as long as there are not too many and they come."""

    def __init__(self, inner: Any, answer: Answer) -> None:
        self._inner, self._answer = inner, answer

    def __iter__(self) -> Iterator[bytes]:
        for data in self._inner:
            self._answer.take(len(data))
            yield data

    def close(self) -> None:
        self._inner.close()


def _transport(error: Exception) -> str:
    kinds = {
        httpx2.ProxyError: "the proxy refuses the connection",
        httpx2.ConnectError: "can't be reached",
        httpx2.ConnectTimeout: "can't be reached in time",
        httpx2.TimeoutException: "the server does not answer",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), "the connection broke")
