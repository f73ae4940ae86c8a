"""Where managed environments are, and what state they are in.

`NAME/` holds the builds and `environment.json`, the marker. A virtual environment can't be moved, so each is built
where it stays, in a folder with a name of its own; the marker, written last and in one step, says which build counts.
What no marker names is rubbish of a killed install: it never counts, and the next install sweeps it away.
`NAME.lock` is held, by qtool and by every process it starts, while something is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from qtool import locks
from qtool.environments.table import ENGINES, find
from qtool.files import disk_errors, expand, write_json

INSTALLED, OUTDATED, BROKEN, ABSENT = "installed", "outdated", "broken", "absent"
BUILD = "build-"
ELSEWHERE = "Free some space, or name another folder in QTOOL_ENVIRONMENTS."


@dataclass(frozen=True)
class Marker:
    """What `environment.json` says: `bytes` on disk, `packages` name to version, `pins` the digest of the pins."""

    build: str
    python: str
    installer: str
    pins: str
    bytes: int
    packages: dict[str, str]


def root() -> Path:
    """The folder of all environments: QTOOL_ENVIRONMENTS, else `environments` in the user's data folder."""
    if named := os.environ.get("QTOOL_ENVIRONMENTS"):
        return expand(named).absolute()
    from platformdirs import user_data_path  # here: workers' interpreters import this module and need not have it

    return user_data_path("qtool") / "environments"


def marker(name: str) -> Marker | None:
    """The marker of environment `name`; None if there is none or it makes no sense."""
    try:
        found = Marker(**json.loads((root() / name / "environment.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.build.startswith(BUILD) and os.sep not in found.build else None


def python(name: str) -> Path | None:
    """The interpreter of environment `name` if that can be used (installed or outdated), else None."""
    found = marker(name)
    return interpreter_of(root() / name / found.build) if found and state(name) != BROKEN else None


def state(name: str) -> str:
    """INSTALLED, OUTDATED (other pins than those of this qtool), BROKEN (parts are gone) or ABSENT."""
    home = root() / name
    found = marker(name)
    if found is None:
        return BROKEN if os.path.lexists(home / "environment.json") else ABSENT
    if not os.access(interpreter_of(home / found.build), os.X_OK) or not has_package(home / found.build, name):
        return BROKEN
    return INSTALLED if found.pins == find(name).digest else OUTDATED


def interpreter_of(build: Path) -> Path:
    """The interpreter of a virtual environment."""
    return build / "bin" / "python"


def has_package(build: Path, name: str) -> bool:
    """Whether the package that environment `name` is for has been installed in this build."""
    package = ENGINES[find(name).engine].package
    return any(build.glob(f"lib/python*/site-packages/{package}/__init__.py"))


def packages(build: Path) -> dict[str, str]:
    """What is installed in this build: canonical name to version."""
    from packaging.utils import canonicalize_name

    found = (path.name.removesuffix(".dist-info") for path in build.glob("lib/python*/site-packages/*.dist-info"))
    return {canonicalize_name(name): version for name, _, version in sorted(each.rpartition("-") for each in found)}


def new_build(name: str) -> Path:
    """A path for a new build of environment `name`, used by nobody before."""
    return root() / name / f"{BUILD}{secrets.token_hex(4)}"


def commit(name: str, found: Marker) -> None:
    """Make the build that `found` names the one that counts, from one moment to the next."""
    home = root() / name
    write_json(home / "environment.json", asdict(found), indent=1, hint=ELSEWHERE)


def sweep(name: str) -> None:
    """Remove every build of environment `name` but the one that counts. Call it with the lock held."""
    found = marker(name)
    home = root() / name
    for path in [*home.iterdir()] if home.is_dir() else []:
        if path.name.startswith(BUILD) and (found is None or path.name != found.build):
            shutil.rmtree(path, ignore_errors=True)


def remove(name: str) -> None:
    """Remove environment `name`, whatever its state. Call it with the lock held."""
    home = root() / name
    with disk_errors(home, hint=ELSEWHERE):
        (home / "environment.json").unlink(missing_ok=True)  # from here on it doesn't count
        if home.exists():
            shutil.rmtree(home)


@contextlib.contextmanager
def locked(name: str, on_wait: Callable[[], None]) -> Iterator[IO[str]]:
    """Hold the lock of environment `name`; `on_wait` is called if another process has it and this one must wait.

    The lock belongs to the open file: a child that inherits it keeps it until that child, too, is gone.

    Raises:
        QtoolError: the folder of the environments can't be written.
    """
    with disk_errors(root(), hint=ELSEWHERE):
        root().mkdir(parents=True, exist_ok=True)
        handle = (root() / f"{name}.lock").open("w")
    with handle:
        locks.wait(handle, on_wait)
        yield handle
