"""A model from a hub: which one a name means, and the folder that it becomes."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qtool.errors import InputError, QtoolError
from qtool.files import expand, is_dir
from qtool.hub import download, lock, tokens
from qtool.hub.download import OnEvent
from qtool.hub.listing import Listing
from qtool.recipe import load
from qtool.recipe.schema import Repository

_FILES_AT_A_TIME = 4


class Place(NamedTuple):
    """A repository.

    Attributes:
        repo: ORG/NAME.
        hub: huggingface, modelers, or auto for the first that has it.
        revision: a branch, tag or commit; None for the default branch.
        also: further names that the same model has or had there.
    """

    repo: str
    hub: str
    revision: str | None
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """ORG/NAME, the one to be taken first."""
        return (self.repo, *self.also)


def find(name: str, hub: str, revision: str | None) -> Place:
    """What ORG/NAME means, or the name of a recipe that names a model.

    Raises InputError when it is neither, or `hub` is not the recipe's.
    """
    if "/" in name:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
            raise InputError("not a repository's name", where=name[:100], hint="It is given as ORG/NAME.")
        return Place(name, hub, revision)
    if name not in load.names():
        with_models = [known for known in load.names() if load.load(known).model]
        hint = f"Give ORG/NAME, or a recipe that names one: {', '.join(with_models)}."
        raise InputError(f"no recipe is named {name[:100]!r}", hint=hint)
    model = load.load(name).model
    if model is None:
        raise InputError(
            "this recipe fits many models and names none", where=f"recipe {name}", hint="Give the model's ORG/NAME."
        )
    if hub not in ("auto", model.hub):
        raise InputError(f"the recipe's model is on {model.hub}", where="--from", hint="Give ORG/NAME for another hub.")
    return Place(model.repo, model.hub, revision or model.revision, tuple(model.also))


def listing(model: Place | Repository, token: Callable[[str], str | None], on_event: OnEvent) -> Listing:
    """The model's repository; where it is gone, the first of its other names that is there, with a warning.

    Raises:
        InputError: no such repository or revision, or no access to it. QtoolError: no answer.
    """

    def find(repo: str) -> Listing:
        return download.find(repo, model.hub, model.revision, token, on_event)

    try:
        return find(model.repo)
    except download.NoSuchRepository as gone:
        there = []
        for name in model.names[1:]:
            with contextlib.suppress(download.NoSuchRepository):
                there.append(find(name))
        if not there:
            others = ", nor is the model there as " + " or ".join(model.names[1:]) if model.names[1:] else ""
            raise download.NoSuchRepository(f"{gone.what}{others}", where=gone.where, hint=gone.hint) from None
        known = ", ".join(found.repo for found in there)
        message = f"{model.repo}: {gone.what}; of its other names there is {known}: {there[0].repo} is taken"
        on_event({"event": "warning", "message": message})
        return there[0]


def folder(place: Place, to: str | Path | None) -> Path:
    """The folder that a download makes: `to`, or the repository's name in the current folder. Raises InputError."""
    target = expand(to or place.repo.rpartition("/")[2]).absolute()
    if not target.name:
        raise InputError("not a path for a folder", where=str(target))
    return target


def held(place: Place, target: Path) -> lock.Lock:
    """What is known of a folder that was downloaded before, without the network.

    Raises:
        InputError: it is not there, or something else is. QtoolError: some of it is missing.
    """
    found = lock.read(target) if is_dir(target) else None
    if found is None:
        hint = "Run the command once with the network, without --offline and HF_HUB_OFFLINE."
        raise InputError("no complete download is there", where=str(target), hint=hint)
    if found.repo not in place.names or place.revision not in (None, found.revision, found.commit):
        raise InputError(f"holds {found.repo}, {found.revision} at {found.commit[:12]}", where=str(target))
    if missing := lock.missing(target, found):
        what = f"incomplete: {missing[0]} is missing or has another size"
        raise QtoolError(what, where=str(target), hint=repair(found, target))
    return found


def repair(found: lock.Lock, target: Path) -> str:
    """How a folder that was downloaded is made whole again, in words."""
    source = ("qtool", "download", found.repo, "--from", found.hub, "--revision", found.commit)
    return f"Repair it: {shlex.join([*source, '--to', str(target), '--overwrite'])}"


def run(model: Place | Repository, target: Path, *, overwrite: bool = True, on_event: OnEvent) -> None:
    """Make `target` the model's folder, or make it whole again; interrupted, it goes on inside the files.

    Args:
        overwrite: replace what else is there.

    Raises:
        InputError, QtoolError: as `qtool download`.
    """
    bring(ask(model, on_event), target, overwrite=overwrite, on_event=on_event)


def ask(model: Place | Repository, on_event: OnEvent) -> Listing:
    """`listing`, with the tokens that variables give. Raises as that."""
    return listing(model, lambda name: tokens.read(name, None), on_event)


def bring(found: Listing, target: Path, *, overwrite: bool, on_event: OnEvent) -> None:
    """`run`, of a repository that has been listed. Raises InputError, QtoolError."""
    planned = download.plan(found, [], [])
    if not overwrite and download.is_there(planned, target, overwrite=False):
        return
    download.obtain(
        planned,
        target,
        tokens.read(found.hub, None),
        workers=_FILES_AT_A_TIME,
        overwrite=overwrite,
        on_event=on_event,
        waiting=lambda: None,
    )
