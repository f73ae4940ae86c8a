"""`qtool download`: a model from a hub, complete and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from qtool import sizes
from qtool.cli.bundle import expanded
from qtool.cli.options import Printed, console, resumable
from qtool.errors import InputError, QtoolError
from qtool.files import expand, is_dir

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.hub.download import Plan
    from qtool.hub.lock import Lock
    from qtool.jobs.download import Place

_SHOWN = 5  # wrong files that an error lists


@dataclass(frozen=True)
class Origin:
    """Where the model is."""

    panel: ClassVar[str] = "Source"

    source: Annotated[
        Literal["auto", "modelers", "huggingface"],
        typer.Option(
            "--from", help="The hub. `auto` takes the recipe's hub, or else tries Hugging Face and then modelers.cn."
        ),
    ] = "auto"
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="A branch, a tag or a commit.", show_default="the default branch")
    ] = None


@dataclass(frozen=True)
class Choice:
    """Which of its files."""

    panel: ClassVar[str] = "Files"

    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Download only files that match. Can be repeated."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Leave out files that match. Can be repeated."),
    ] = None


@dataclass(frozen=True)
class Transfer:
    """How files come."""

    panel: ClassVar[str] = "Transfer"

    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="A file that holds the access token.")
    ] = None
    workers: Annotated[int, typer.Option(min=1, max=64, help="The number of files to download at a time.")] = 4


@dataclass(frozen=True)
class Mode:
    """What is done with what is there, and what must not be done."""

    panel: ClassVar[str] = "Run"

    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check every byte of a folder that was downloaded before. Give its path, or ORG/NAME."
        ),
    ] = False
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network, only files that are there.")] = (
        False
    )
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be downloaded and stop.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it holds something else.")] = (
        False
    )


@expanded
def download(
    repo: Annotated[
        str, typer.Argument(metavar="ORG/NAME|RECIPE", help="A repository, or the name of a recipe that has one.")
    ],
    origin: Origin,
    *,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="DIR", help="The folder to make.", show_default="NAME, here", rich_help_panel="Files"
        ),
    ] = None,
    choice: Choice,
    transfer: Transfer,
    mode: Mode,
    printed: Printed,
) -> None:
    """Download a model from modelers.cn or Hugging Face and print the folder's path.

    After an interruption, run the same command again: it continues, also within a file. The folder appears only when
    every file has the size and the hash that the hub announced. Its qtool.lock.json records repository, commit and
    hashes.

    Examples:

      qtool download HuggingFaceTB/SmolLM2-135M-Instruct

      qtool download deepseek-r1-w8a8 --to /data/models/DeepSeek-R1-W8A8

      qtool download Qwen/Qwen3-8B | qtool quantize - | qtool generate - --prompt "I am"

      qtool download --verify /data/models/DeepSeek-R1-W8A8
    """
    from qtool.jobs import download as jobs

    with console("starting") as out:
        if mode.verify and _is_folder(repo):
            _verify(expand(repo).absolute(), transfer.workers, out)
            return
        place = jobs.find(repo, origin.source, origin.revision)
        target = jobs.folder(place, to)
        if mode.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            _use(place, target, transfer.workers, out, verify=mode.verify)
        else:
            _fetch(place, target, choice, transfer, mode, out)


def _verify(folder: Path, workers: int, out: Console) -> None:
    held = _check(folder, workers, out)
    out.result(_lock_facts(held, folder) if out.json else folder)


def _use(place: Place, target: Path, workers: int, out: Console, *, verify: bool) -> None:
    """The folder as it is, without the network."""
    from qtool.jobs import download as jobs

    held = jobs.held(place, target)
    if verify:
        _check(target, workers, out)
    out.result(_lock_facts(held, target) if out.json else target)


def _fetch(place: Place, target: Path, choice: Choice, transfer: Transfer, mode: Mode, out: Console) -> None:
    """Have the folder made, unless it is there."""
    from qtool.hub import download as hub
    from qtool.hub import tokens
    from qtool.jobs import download as jobs

    if transfer.token_file and place.hub == "auto":
        what = "say which hub this token is for, so that it is sent to no other hub"
        raise InputError(what, where="--token-file", hint="Add --from.")
    listing = jobs.listing(place, lambda name: tokens.read(name, transfer.token_file), out.event)
    planned = hub.plan(listing, choice.include or [], choice.exclude or [])
    out.info(_summary(planned))
    if mode.dry_run:
        _show(planned, target, out)
        return
    resumable(by=None)
    if not hub.is_there(planned, target, overwrite=mode.overwrite):
        hub.obtain(
            planned,
            target,
            tokens.read(listing.hub, transfer.token_file),
            workers=transfer.workers,
            overwrite=mode.overwrite,
            on_event=out.event,
            waiting=lambda: out.info("another qtool is downloading to this folder: waiting for it"),
        )
    elif mode.verify:
        _check(target, transfer.workers, out)
    else:
        out.info(f"{target} is already complete (--verify checks every byte)")
    out.result(_facts(planned, target) if out.json else target)


def _is_folder(repo: str) -> bool:
    return is_dir(expand(repo)) or repo.startswith((".", "/", "~"))


def _summary(planned: Plan) -> str:
    from qtool.hub.listing import HUBS

    listing = planned.listing
    left = f", {len(planned.left)} left out" if planned.left else ""
    return (
        f"{listing.repo} from {HUBS[listing.hub]} ({listing.endpoint}), {listing.revision} at {listing.commit[:12]}: "
        f"{len(listing.files)} files, {sizes.show(planned.nbytes)}{left}"
    )


def _show(planned: Plan, target: Path, out: Console) -> None:
    from qtool.files import check_free_space
    from qtool.hub.storage import partial_path, present

    files = planned.listing.files
    there = present(partial_path(target), files)
    rows = [["download", sizes.show(file.size), file.path] for file in files]
    rows += [["leave", "", ascii(file.path)[1:-1]] for file in planned.left]
    out.table(f"to {target}", ["", "size", "file"], rows)
    check_free_space(target, planned.nbytes - there, option="--to")
    facts = _facts(planned, target) | {"bytes_there": there}
    out.result(facts if out.json else f"{len(files)} files, {sizes.show(planned.nbytes - there)} to download")


def _facts(planned: Plan, target: Path) -> dict[str, Any]:
    listing = planned.listing
    return {
        "path": str(target),
        "hub": listing.hub,
        "endpoint": listing.endpoint,
        "repo": listing.repo,
        "revision": listing.revision,
        "commit": listing.commit,
        "bytes": planned.nbytes,
        "files": {file.path: file.size for file in listing.files},
    }


def _check(folder: Path, workers: int, out: Console) -> Lock:
    """Read every file of a downloaded folder and compare it with the lock."""
    from qtool.hub import lock
    from qtool.jobs.download import repair

    held = lock.read(folder)
    if held is None:
        hint = "Only a folder that qtool download made can be checked later."
        raise InputError(f"no {lock.LOCK} in this folder", where=str(folder), hint=hint)
    wrong = lock.verify(
        folder, held, lambda stage, done, total: out.progress(stage, done, total, "bytes"), workers=workers
    )
    if wrong:
        listed = "; ".join(f"{path} {problem}" for path, problem in sorted(wrong.items())[:_SHOWN])
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise QtoolError(f"{listed}{more}", where=str(folder), hint=repair(held, folder))
    extra = lock.unknown(folder, held)
    if extra:
        out.warning(f"not downloaded, so not checked: {', '.join(map(ascii, extra[:_SHOWN]))}")
    out.info(f"{len(held.files)} files are as downloaded: {held.repo} at {held.commit[:12]}")
    return held


def _lock_facts(held: Lock, folder: Path) -> dict[str, Any]:
    return {
        "path": str(folder),
        "hub": held.hub,
        "endpoint": held.endpoint,
        "repo": held.repo,
        "revision": held.revision,
        "commit": held.commit,
        "bytes": sum(size for size, _ in held.files.values()),
        "files": {path: size for path, (size, _) in held.files.items()},
    }
