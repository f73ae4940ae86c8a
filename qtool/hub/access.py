"""What both hubs' clients have in common: their interface, and the words for why a repository can't be had."""

from __future__ import annotations

import http.client
import logging
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from qtool.errors import InputError, QtoolError
from qtool.hub.bounds import Requests
from qtool.hub.listing import HUBS, Listing, RemoteFile
from qtool.hub.patience import Again
from qtool.hub.sink import Sink

TIMEOUT = 30.0  # seconds without a byte, where a client knows no limit of its own
PIECE = 1 << 18  # bytes a client gathers before it hands them on; both have 10 MB, lost when a connection breaks
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class Absent(InputError):
    """This hub has no such repository, or none that this token may see: another hub may have it."""


class Unreadable(QtoolError):
    """The hub's answer is not what its client expects."""


class Hub(ABC):
    """One hub through its own client. Every method makes one attempt.

    Attributes:
        name: a key of HUBS.
        endpoint: the hub's address.
        token: what requests to it carry, if anything.
        requests: counts those of a listing.
        stop: once set, every new request raises Stopped.
        one_by_one: whether only one file at a time can be sent.
    """

    name: str
    endpoint: str
    one_by_one = False

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.stop = threading.Event()
        self.requests = Requests()

    @abstractmethod
    def listing(self, repo: str, revision: str | None) -> Listing:
        """What the repository holds, if its files may be had at all."""

    @abstractmethod
    def fetch(self, listing: Listing, file: RemoteFile, sink: Sink) -> None:
        """Bring the rest of a file, from where `sink` stands."""

    @abstractmethod
    def create(self, repo: str, private: bool) -> None:
        """Make an empty repository, unless there is one of that name."""

    def claim(self, repo: str, private: bool) -> None:
        """`create`, and be as sure as can be that this token may write to the repository."""
        self.create(repo, private)

    @abstractmethod
    def send(self, repo: str, files: Mapping[str, Path | bytes], message: str) -> None:
        """Commit files, by their path in the repository, to its default branch."""

    @abstractmethod
    def explain(self, error: Exception) -> Exception | None:
        """What an exception of the client means: Again, Absent, or an error for the user; None if it is none of its."""

    def check_busy(self, status: int, after: str | None) -> None:
        """Raise Again for an answer that another try may change; `after` is its Retry-After header.

        To be called on every answer before the client sees it: the client would sleep as long as the server likes, and
        can't be woken.
        """
        if status in _BUSY:
            what = f"the server answers {_phrase(status)}"
            raise Again(what, after=float(after) if after and after.isdigit() else 0.0)

    def denial(self, status: int) -> QtoolError:
        """What an HTTP status means that no more telling answer came with."""
        if status == HTTPStatus.UNAUTHORIZED:
            return self.unauthorized()
        return QtoolError(f"the server answers {_phrase(status)}", where=self.endpoint)

    def unauthorized(self) -> InputError:
        if self.token:
            hint = "Check the token on the hub: it may have expired, or lack the permission."
            return InputError("the token is not valid here", where=self.endpoint, hint=hint)
        return InputError("needs a token", where=self.endpoint, hint=self.token_hint)

    def gated(self, repo: str) -> InputError:
        if self.token:
            what = "gated: this token's account has not been granted access"
            return InputError(what, where=repo, hint=f"Ask for it on the model's page: {self.endpoint}/{repo}")
        what = "gated: only accounts that accepted its terms may download it"
        return InputError(what, where=repo, hint=f"Accept them at {self.endpoint}/{repo}; {self.token_hint}")

    def absent(self, repo: str) -> Absent:
        if self.token:
            return Absent(f"no such repository on {HUBS[self.name]}, or this token may not see it", where=repo)
        what = f"no such repository on {HUBS[self.name]}, or it is private"
        return Absent(what, where=repo, hint=f"If private: {self.token_hint}")

    def no_revision(self, repo: str, revision: str | None) -> InputError:
        what = f"has no branch, tag or commit {revision!r}" if revision else "is empty: it has no default branch"
        return InputError(what, where=repo)

    def unreadable(self, error: Exception) -> Unreadable:
        logging.getLogger(__name__).warning("%s", "".join(traceback.format_exception(error)))
        what = f"its answer can't be understood ({type(error).__name__})"
        return Unreadable(what, where=self.endpoint, hint="Is this the address of such a hub?")

    @property
    def token_hint(self) -> str:
        return f"give a token with --token-file FILE or {TOKEN_VARIABLES[self.name]}."


def _phrase(status: int) -> str:
    return f"{status} {http.client.responses.get(status, '')}".strip()


TOKEN_VARIABLES = {"huggingface": "HF_TOKEN", "modelers": "OPENMIND_HUB_TOKEN"}
