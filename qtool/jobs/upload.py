"""A model folder to a repository on a hub: the right to write there is checked early, the files follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qtool import workers
from qtool.errors import InputError
from qtool.hub import tokens
from qtool.hub.download import ask
from qtool.hub.listing import HUBS
from qtool.hub.upload import README, Parcel
from qtool.jobs.models import parse

OnEvent = Callable[[workers.Event], None]


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    Attributes:
        repo: ORG/NAME.
        hub: huggingface or modelers.
        token: None for the one that the hub's client knows.
        private: what the repository is made as, if it has to be made.
    """

    repo: str
    hub: str
    token: str | None = field(repr=False)
    private: bool = False

    @property
    def shown(self) -> str:
        """In words."""
        return f"{self.repo} on {HUBS[self.hub]}"


def target(text: str, where: str, *, private: bool) -> Target:
    """What `[modelers:|hf:]ORG/NAME` means, with the token that a variable gives.

    Args:
        where: the option that says so.

    Raises:
        InputError: not the name of a repository, or no token where there should be one.
    """
    place = parse(text)
    if place is None or place.revision is not None:
        hint = "It is given as ORG/NAME, or as modelers:ORG/NAME."
        raise InputError(f"{text[:100]!r} is not a repository's name", where=where, hint=hint)
    hub = "huggingface" if place.hub == "auto" else place.hub
    return Target(place.repo, hub, tokens.read(hub, None), private)


def claim(to: Target, on_event: OnEvent) -> None:
    """Make the repository unless it is there, and see that this token may write to it.

    Raises:
        InputError: it may not. QtoolError: the hub gives no answer.
    """
    ask("claim", to.hub, to.token, on_event, doing=f"asking {HUBS[to.hub]}", repo=to.repo, private=to.private)


def send(parcel: Parcel, to: Target, on_event: OnEvent) -> dict[str, Any]:
    """Have the files in the repository; those that it has already are not sent again.

    Returns:
        url, hub, repo, commit, and the paths that were sent and skipped.

    Raises:
        InputError: no right to do so. QtoolError: the hub refuses, or gives no answer.
    """
    texts = {README: parcel.card} if parcel.card else {}
    answer = ask(
        "publish",
        to.hub,
        to.token,
        on_event,
        repo=to.repo,
        private=to.private,
        files={name: str(file) for name, file in parcel.files.items()},
        texts=texts,
        message="Upload with qtool",
    )
    return {
        "url": f"{answer['endpoint']}/{'models/' if to.hub == 'modelers' else ''}{to.repo}",
        "hub": to.hub,
        "repo": to.repo,
        "commit": answer["commit"],
        "sent": [name for name in parcel.names if name not in answer["skipped"]],
        "skipped": answer["skipped"],
    }
