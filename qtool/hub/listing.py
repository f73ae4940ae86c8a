"""What a hub says a repository holds. Plain data, so that it travels between processes as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HUBS = {"huggingface": "Hugging Face", "modelers": "modelers.cn"}


@dataclass(frozen=True)
class RemoteFile:
    """One entry of a repository, exactly as the hub announces it: nothing here has been checked.

    Attributes:
        path: relative to the repository's root, with slashes.
        size: in bytes.
        digest: sha256, or git's sha1 of the blob; lower-case hex. Empty for what is neither file nor folder.
    """

    path: str
    size: int
    digest: str

    @property
    def algorithm(self) -> str:
        """sha256 or git-sha1."""
        return "git-sha1" if len(self.digest) == 40 else "sha256"


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        hub: a key of HUBS.
        endpoint: the hub's address.
        repo: ORG/NAME.
        revision: as asked for: a branch, a tag or a commit.
        commit: what that was at the time of listing.
        files: every file, in the hub's order.
    """

    hub: str
    endpoint: str
    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Listing:
        return cls(**{**data, "files": tuple(RemoteFile(**file) for file in data["files"])})
