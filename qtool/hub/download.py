"""From a repository's name to a complete, checked folder. Runs in the parent; the hub's client runs in a worker."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.checkpoint.header import read_header
from qtool.checkpoint.storage import put_in_place, tidy
from qtool.environments.lookup import interpreter
from qtool.errors import InputError, QtoolError
from qtool.files import check_free_space, exists, read_json, sync
from qtool.hub import lock, names, selection, storage
from qtool.hub.bounds import LISTING_SECONDS
from qtool.hub.listing import HUBS, Listing, RemoteFile

OnEvent = Callable[[workers.Event], None]


class NoSuchRepository(InputError):
    """The hub has no such repository, or none that this token may see."""


@dataclass(frozen=True)
class Plan:
    """What a download will bring.

    Attributes:
        listing: the repository at its commit, only with what is wanted.
        left: files of the repository that are not.
        whole: whether the user left the choice to qtool, so that an index must be complete.
    """

    listing: Listing
    left: list[RemoteFile]
    whole: bool

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.listing.files)


def ask(
    task: str,
    hub: str,
    token: str | None,
    on_event: OnEvent,
    *,
    timeout: float | None = None,
    doing: str = "starting",
    **job: Any,
) -> dict[str, Any]:
    """Have a worker with the hub's client do a task (see `hub.worker`). Raises as `workers.run`."""
    with _client(hub) as (python, env):
        job = {"task": task, "hub": hub, "token": token, **job}
        return workers.run(
            "qtool.hub.worker", job, python=python, on_event=on_event, env=env, timeout=timeout, doing=doing
        )


@contextlib.contextmanager
def _client(hub: str) -> Iterator[tuple[str | None, dict[str, str]]]:
    """The interpreter and the variables for a hub's client.

    openmind_hub 1.3.0 refuses to be imported when its cache would lie in a system folder, so it gets one in /tmp, which
    it does not use; and a variable can make it talk to quite another hub.
    """
    if hub == "huggingface":
        yield None, {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return
    endpoint = os.environ.get("OPENMIND_HUB_ENDPOINT", "https://")
    if not endpoint.startswith("https://"):
        raise InputError(
            "must begin with https://", where="OPENMIND_HUB_ENDPOINT", hint="openmind-hub accepts no other address."
        )
    python = interpreter("openmind-hub")
    with tempfile.TemporaryDirectory(prefix="qtool-", dir="/tmp") as cache:
        yield python, {"OM_HUB_DISABLE_PROGRESS_BARS": "1", "OPENMIND_PLATFORM": "openmind", "XDG_CACHE_HOME": cache}


def find(repo: str, hub: str, revision: str | None, token: Callable[[str], str | None], on_event: OnEvent) -> Listing:
    """List a repository.

    Args:
        repo: ORG/NAME.
        hub: a key of HUBS, or auto: Hugging Face, and modelers.cn if it has no such repository.
        revision: a branch, tag or commit; None for the default branch.
        token: the token for a hub, or None.

    Raises:
        NoSuchRepository: none of the hubs has it. InputError: no such revision, or no access. QtoolError: no answer.
    """
    candidates = list(HUBS) if hub == "auto" else [hub]
    reasons, hints = [], []
    for candidate in candidates:
        if candidate == "modelers" and hub == "auto" and not _has_openmind():
            hints.append("modelers.cn was not asked: that needs openmind-hub")
            continue
        answer = ask(
            "list",
            candidate,
            token(candidate),
            on_event,
            timeout=LISTING_SECONDS,
            doing=f"asking {HUBS[candidate]}",
            repo=repo,
            revision=revision,
        )
        if "listing" in answer:
            return Listing.from_json(answer["listing"])
        reasons.append(answer["absent"])
        hints.append(answer["hint"])
    raise NoSuchRepository("; ".join(reasons), where=repo, hint=" ".join(filter(None, hints)) or "Check the name.")


def _has_openmind() -> bool:
    try:
        interpreter("openmind-hub")
    except InputError:
        return "QTOOL_OPENMIND_HUB_PYTHON" in os.environ
    return True


def plan(listing: Listing, include: Sequence[str], exclude: Sequence[str]) -> Plan:
    """Choose what to download and refuse what must not be. Raises InputError."""
    taken, left = selection.select(listing.files, include, exclude, listing.repo)
    names.check(taken, listing.repo)
    return Plan(replace(listing, files=tuple(taken)), left, whole=not include and not exclude)


def is_there(planned: Plan, target: Path, *, overwrite: bool) -> bool:
    """Whether `target` holds the plan's files already, in the right sizes; with `overwrite` nobody relies on these.

    Raises:
        InputError: something else is there, and `overwrite` is off or it is nothing that may be replaced.
    """
    exists(storage.partial_path(target))  # its longest name is one that can be
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return False
    held = lock.read(target) if target.is_dir() and not target.is_symlink() else None
    if held and held.covers(planned.listing) and not lock.missing(target, held) and not overwrite:
        return True
    listing = planned.listing
    if held is None:
        if overwrite and target.is_dir() and not target.is_symlink() and (target / "config.json").exists():
            return False
        what = "is not a model folder, so --overwrite does not replace it" if overwrite else "exists already"
        raise InputError(what, where=str(target), hint="Choose another folder with --to.")
    if overwrite:
        return False
    if (held.repo, held.hub) != (listing.repo, listing.hub):
        what = f"holds {held.repo} from {HUBS.get(held.hub, held.hub)}"
    elif held.commit != listing.commit:
        what = f"holds commit {held.commit[:12]}, the hub has {listing.commit[:12]}"
    else:
        what = "holds other files of this commit, or not all of them"
    hint = "Choose another --to, or pass --overwrite: correct files are not downloaded again."
    raise InputError(what, where=str(target), hint=hint)


def obtain(
    planned: Plan,
    target: Path,
    token: str | None,
    *,
    workers: int,
    overwrite: bool,
    on_event: OnEvent,
    waiting: Callable[[], None],
) -> None:
    """Make `target` the complete folder, continuing whatever an earlier run began.

    Args:
        waiting: called when another process is downloading to the same folder; it goes first.

    Raises:
        InputError, QtoolError: what came so far stays beside `target`, hidden.
    """
    partial, listing = storage.partial_path(target), planned.listing
    complete = partial / storage.COMPLETE
    with storage.locked(partial, waiting):
        tidy(target, keep_resumable=True)  # a kill while the new folder took the old one's place
        if is_there(planned, target, overwrite=overwrite):  # the other process has just finished
            storage.remove(partial)
            return
        files = listing.files
        with storage.Storage(partial) as inside:
            inside.keep_only({file.path for file in files})
            if overwrite and target.is_dir():
                inside.adopt(target, files)
        there = storage.present(partial, files)
        try:
            check_free_space(target, planned.nbytes - there, option="--to")
        except QtoolError:
            if not there:
                storage.remove(partial)
            raise
        answer = ask(
            "fetch", listing.hub, token, on_event, listing=listing.to_json(), folder=str(partial), workers=workers
        )
        check_structure(complete, listing, whole=planned.whole)
        lock.write(complete, listing, answer["sha256"])
        with storage.errors(target):
            for folder, _, _ in os.walk(complete):
                sync(Path(folder))
            sync(complete / lock.LOCK)
            aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            put_in_place(complete, target, overwrite=overwrite, aside=aside)
        storage.remove(partial)


def check_structure(folder: Path, listing: Listing, *, whole: bool) -> None:
    """Parse every safetensors header; with `whole`, every index must find its tensors.

    Raises:
        QtoolError: the hub has these very bytes, so the repository itself is damaged.
    """
    paths = [file.path for file in listing.files]
    tensors: dict[str, set[str]] = {}
    try:
        for path in paths:
            if path.endswith(".safetensors"):
                tensors[path] = {info.name for info in read_header(folder / path)}
        for path in paths:
            if whole and path.endswith(".safetensors.index.json"):
                _check_index(folder / path, path.rpartition("/")[0], tensors)
    except InputError as error:
        place = Path(error.where or "")
        name = place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)
        raise QtoolError(
            f"damaged on the hub: {name}: {error.what}",
            where=f"{listing.repo}, commit {listing.commit[:12]}",
            hint="Try another --revision, or do without the file: --exclude",
        ) from None


def _check_index(file: Path, folder: str, tensors: dict[str, set[str]]) -> None:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("has no weight_map", where=str(file))
    for tensor, shard in weight_map.items():
        path = f"{folder}/{shard}" if folder else str(shard)
        if path not in tensors:
            raise InputError(f"names {names.shown(shard)}, which is not there", where=str(file))
        if tensor not in tensors[path]:
            raise InputError(f"looks for {names.shown(tensor)} in {shard}, which lacks it", where=str(file))
