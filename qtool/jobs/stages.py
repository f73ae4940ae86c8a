"""A job of several stages in one folder, of which only what is not done yet is done.

A stage is known by what decides its output: its inputs (parameters, and digests of the files it reads) and qtool's
version. What it made is known by the SHA-256 of each file. A stage is done when both are as recorded; times count for
nothing. `qtool-run.json` in the folder has the records; each is written before its stage begins, without files, and
again when it has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool import locks
from qtool.checkpoint.reader import REPORT
from qtool.checkpoint.storage import tidy
from qtool.errors import InputError, QtoolError
from qtool.files import disk_errors, draft, exists, read_json, write_json
from qtool.jobs import contents
from qtool.jobs.contents import Files
from qtool.version import __version__

STATE = "qtool-run.json"


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        name, output: as given.
        kept: whether it was done before.
        seconds: how long it took when it was done; None where that run was killed just then.
        digest: of the output's content.
    """

    name: str
    output: Path
    kept: bool
    seconds: float | None
    digest: str


@dataclass
class Job:
    """The stages in `folder`, in the order in which they are asked for. Use it inside `opened`.

    Args:
        say: told about every stage, in a line.
        progress: gets stage, bytes done and bytes in all while files are hashed.
    """

    folder: Path
    say: Callable[[str], None]
    progress: Callable[[str, int, int], None]
    done: list[Done] = field(default_factory=list)
    _records: dict[str, Any] = field(default_factory=dict)

    def stage(
        self, name: str, output: str, inputs: dict[str, Any], make: Callable[[Path], object], *, repair: bool = False
    ) -> Done:
        """Have `make(path)` make the file or folder `output` in the job's folder, unless that is done.

        `make` must make it complete or not at all. What is there of an earlier run is removed first; with `repair`
        only the files that are not as they were.

        Raises:
            QtoolError: what `make` raises; the stages before stay done.
        """
        path = self.folder / output
        key = contents.digest({"stage": name, "output": output, "qtool": __version__, **inputs})
        record = self._records.get(name) or {}
        known = record.get("key") == key
        files = self._measure(name, path) if known else {}
        # The record of an unfinished stage has no files; but its output, if there, came into being complete.
        recorded: Files | None = record.get("files", None if repair else files)
        wrong = _wrong(recorded or {}, files)
        if known and path.exists() and recorded is not None and not wrong:
            self.say(f"{name}: done already")
            return self._finish(name, output, key, files=recorded, seconds=record.get("seconds"), kept=True)
        if not record:
            self.say(f"{name}: begins")
        elif not known:
            self.say(f"{name}: running again, because its inputs have changed")
        elif wrong:
            self.say(f"{name}: running again, because {wrong[0]} has changed")
        else:
            self.say(f"{name}: goes on")
        if repair and known:
            for file in wrong:
                (path / file).unlink(missing_ok=True)
        else:
            self._remove(record.get("output", output), keep_resumable=known)
            self._remove(output, keep_resumable=known)
        self._records[name] = {"key": key, "output": output}
        self._save()
        started = time.monotonic()
        make(path)
        seconds = round(time.monotonic() - started, 2)
        self.say(f"{name}: done in {seconds:.1f} s")
        return self._finish(name, output, key, self._measure(name, path), seconds, kept=False)

    def _measure(self, name: str, path: Path) -> Files:
        return contents.of_output(path, lambda done, total: self.progress(f"{name}: checking", done, total))

    def _finish(self, name: str, output: str, key: str, files: Files, seconds: float | None, *, kept: bool) -> Done:
        record = {"key": key, "output": output, "seconds": seconds, "files": files}
        if self._records.get(name) != record:
            self._records[name] = record
            self._save()
        self.done.append(Done(name, self.folder / output, kept, seconds, contents.together(files)))
        return self.done[-1]

    def _remove(self, output: str, *, keep_resumable: bool) -> None:
        if Path(output).name != output or output in ("", ".."):
            return  # whatever the file says, nothing outside this folder
        path = self.folder / output
        tidy(path, keep_resumable=keep_resumable)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _save(self) -> None:
        content = {"qtool": __version__, "stages": self._records}
        write_json(self.folder / STATE, content, indent=1)


def _wrong(recorded: Files, found: Files) -> list[str]:
    """Files that are missing or have other bytes; what somebody put beside them is nobody's business.

    An evaluation by hand adds its figures to a checkpoint's report, which so may differ.
    """
    return [
        path
        for path, sha256 in recorded.items()
        if path not in found or (found[path] != sha256 and Path(path).name != REPORT)
    ]


@contextlib.contextmanager
def opened(folder: Path, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> Iterator[Job]:
    """The job in `folder`, which is made if need be and belongs to this process alone for so long.

    Raises:
        InputError: the folder holds something else. QtoolError: another process is at work in it.
    """
    with disk_errors(folder):
        state = folder / STATE
        if exists(folder) and not exists(state) and not _is_empty(folder):
            raise InputError(
                "is not empty and not the folder of a job", where=str(folder), hint="Choose another --work."
            )
        folder.mkdir(parents=True, exist_ok=True)
        handle = locks.open_folder(folder)
    try:
        if not locks.lock(handle):
            raise QtoolError("another qtool run is working in this folder", where=str(folder))
        job = Job(folder, say, progress)
        if state.exists():
            stages = read_json(state).get("stages")
            job._records = {k: v for k, v in stages.items() if isinstance(v, dict)} if isinstance(stages, dict) else {}
        else:
            job._save()
        yield job
    finally:
        os.close(handle)


def _is_empty(folder: Path) -> bool:
    """A run that was killed before its first record was in place has left that record's draft at most."""
    return folder.is_dir() and all(path == draft(folder / STATE) for path in folder.iterdir())
