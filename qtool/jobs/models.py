"""A model by whatever name somebody gives it: a folder, a GGUF file, or a repository on a hub.

A repository is looked for where a model may lie already: the folder that `qtool download` makes here, qtool's own
cache, Hugging Face's cache. Only what is in none of them is downloaded, and checked as `qtool download` checks it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qtool import conversion, sizes, workers
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.snapshot import title
from qtool.errors import InputError, QtoolError
from qtool.files import exists, expand, is_dir, real
from qtool.hub import lock
from qtool.hub.download import NoSuchRepository
from qtool.hub.listing import HUBS
from qtool.jobs import download
from qtool.jobs.download import Place

OnEvent = Callable[[workers.Event], None]

_PREFIXES = {"modelers": "modelers", "huggingface": "huggingface", "hf": "huggingface"}
_NAME = re.compile(r"(?:(?P<hub>[a-z]+):)?(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "tekken")  # how their files' names begin


@dataclass(frozen=True)
class Model:
    """A model that is here.

    Attributes:
        path: its folder.
        name: what it is called, the last part of its repository's name or of its path.
        beside: what a default output's path begins with: the folder itself, or `name` in the current folder.
    """

    path: Path
    name: str
    beside: Path


@dataclass(frozen=True)
class Access:
    """How models are had that are not here yet.

    Attributes:
        offline: use what is here, never the network; HF_HUB_OFFLINE says so too.
        on_event: hears of a download or a conversion.
        say: told in a line what is used, or will be fetched.
    """

    offline: bool
    on_event: OnEvent
    say: Callable[[str], None] = lambda _: None

    @property
    def is_offline(self) -> bool:
        return self.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def find(text: str, access: Access) -> Model:
    """The model that `text` names, fetched or converted first if need be.

    Args:
        text: a folder, a GGUF file, or `[modelers:|hf:]ORG/NAME[@REVISION]`. What exists on the disk is meant first;
            and where a folder ORG is here, ORG/NAME is a path that is wrong, unless the model is on this machine.

    Raises:
        InputError: there is no such folder or repository, or it is not here and the network is not to be used.
        QtoolError: the hub gives no answer, or a wrong one.
    """
    path = expand(text)
    if not exists(path) and (place := parse(text)) is not None:
        return _from_hub(text, place, access)
    if exists(path) and not is_dir(path):
        return _from_gguf(path.absolute(), path.absolute().with_suffix(""), access)
    return _in_folder(path, Model(path, title(path), path.absolute()), access)


def parse(text: str) -> Place | None:
    """The repository that `text` names, or None if it looks like nothing but a path. Raises InputError: no such hub."""
    found = _NAME.fullmatch(text)
    if found is None or text.endswith(".gguf"):
        return None
    hub = found["hub"]
    if hub is not None and hub not in _PREFIXES:
        hint = f"Write ORG/NAME, or with one of these before it: {', '.join(f'{known}:' for known in _PREFIXES)}"
        raise InputError(f"no hub is called {hub}", where=text, hint=hint)
    return Place(found["repo"], _PREFIXES[hub] if hub else "auto", found["revision"])


def _from_hub(text: str, place: Place, access: Access) -> Model:
    name = place.repo.rpartition("/")[2]
    for folder in _candidates(place):
        if _is_complete(folder, place):
            access.say(f"{text}: {folder}")
            return _in_folder(folder, Model(folder, name, Path.cwd() / name), access)
    path = expand(text) if text == place.repo else None  # a bare name may be meant as a path
    if path is not None and is_dir(path.parent):
        hint = f"Check the path. For the model of this name on a hub, write hf:{text} or modelers:{text}."
        raise InputError("no such folder", where=str(path.absolute()), hint=hint)
    if access.is_offline:
        hint = "Without --offline and HF_HUB_OFFLINE it is downloaded. Or give the path of a folder."
        raise InputError("no such folder, and no model of this name is on this machine", where=text, hint=hint)
    try:
        listing = download.ask(place, access.on_event)
    except NoSuchRepository as error:
        what = error.what if path is None else f"no such folder; and as a name: {error.what}"
        raise InputError(what, where=text, hint=error.hint) from None
    except InputError:  # the hub has it
        raise
    except QtoolError as error:
        if path is None:
            raise
        what = f"there is no folder {text} here, and its hub can't be asked: {error.what}"
        hint = f"If you mean a folder, check the path. {error.hint or ''}"
        raise QtoolError(what, where=error.where, hint=hint) from None
    target = _cache(place, listing.hub)
    nbytes = sum(file.size for file in listing.files)
    access.say(f"{text}: {HUBS[listing.hub]} has it, up to {sizes.show(nbytes)}; it goes to {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    download.bring(listing, target, overwrite=True, on_event=access.on_event)
    return _in_folder(target, Model(target, name, Path.cwd() / name), access)


def _candidates(place: Place) -> Iterator[Path]:
    """Folders where a repository may lie, the nearest first."""
    yield Path.cwd() / place.repo.rpartition("/")[2]
    hubs = ("huggingface", "modelers") if place.hub == "auto" else (place.hub,)
    for hub in hubs:
        yield _cache(place, hub)
    if "huggingface" in hubs and (snapshot := _snapshot(place)) is not None:
        yield snapshot


def _cache(place: Place, hub: str) -> Path:
    """The folder in qtool's own cache."""
    from platformdirs import user_cache_path

    revision = (place.revision or "default").replace("/", "--")
    return user_cache_path("qtool") / "models" / hub / revision / place.repo


def _snapshot(place: Place) -> Path | None:
    """The folder in Hugging Face's cache, as huggingface_hub 1.x lays it out; its files are links to blobs there."""
    if (named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")) is not None:
        cache = expand(named)
    elif home := os.environ.get("HF_HOME"):
        cache = expand(home) / "hub"
    else:
        cache = expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"
    folder = cache / f"models--{place.repo.replace('/', '--')}"
    wanted = place.revision or "main"
    try:
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = wanted
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    return folder / "snapshots" / commit


def _is_complete(folder: Path, place: Place) -> bool:
    """Whether a folder holds this repository, with all that a model needs."""
    if not is_dir(folder):
        return False
    try:
        if (held := lock.read(folder)) is not None:
            right = held.repo == place.repo and place.hub in ("auto", held.hub)
            wanted = place.revision in (None, held.revision, held.commit)
            return right and wanted and not lock.missing(folder, held)
        if folder.parent.name != "snapshots":
            return False
        Checkpoint.open(folder)  # looks at every header, and sees what an index misses
    except InputError:
        return False
    return any(file.name.startswith(_TOKENIZERS) for file in folder.iterdir())


def _in_folder(folder: Path, model: Model, access: Access) -> Model:
    """The model in a folder; converted, where the folder holds nothing but a GGUF file."""
    if not is_dir(folder) or exists(folder / "config.json"):
        return model
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return model
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(f"several GGUF files: {names}", where=str(folder), hint="Give the path of one of them.")
    return _from_gguf(files[0], model.beside, access)


def _from_gguf(file: Path, beside: Path, access: Access) -> Model:
    """A GGUF file as a checkpoint in qtool's cache, made once for each content."""
    from platformdirs import user_cache_path

    if file.suffix != ".gguf":
        hint = "Give a model folder, a GGUF file or ORG/NAME."
        raise InputError("is a file, but not a GGUF file", where=str(file), hint=hint)
    seen = file.stat()
    key = hashlib.sha256(f"{real(file)} {seen.st_size} {seen.st_mtime_ns}".encode()).hexdigest()[:16]
    target = user_cache_path("qtool") / "models" / "gguf" / key / file.stem
    if not exists(target / "config.json"):
        access.say(f"{file.name} is converted first, into {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        conversion.from_gguf(file, target, "bfloat16", overwrite=True, on_event=access.on_event)
    return Model(target, file.stem, beside)
