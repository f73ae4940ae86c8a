"""Making a managed environment: a fresh virtual environment, the packages, and only then the marker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.environments import store
from qtool.environments.installers import Installer, Pip, Uv
from qtool.environments.table import Environment
from qtool.errors import InputError, QtoolError
from qtool.files import disk_errors, free_space, used_space
from qtool.workers import commands
from qtool.workers.processes import isolated_python

PROBE = """import importlib.util as u, json, platform, sys
print(json.dumps([platform.python_version(), bool(u.find_spec("venv")), bool(u.find_spec("ensurepip"))]))"""
PROBE_SECONDS = 30

# What would send packages elsewhere than into the environment; an empty value wins over pip's configuration files.
PIP_VARIABLES = {"PIP_USER": "0", "PIP_TARGET": "", "PIP_PREFIX": "", "PIP_ROOT": "", "PIP_REQUIRE_VIRTUALENV": "0"}

Event = dict[str, Any]
Events = Callable[[Event], None]


@dataclass(frozen=True)
class Base:
    """An interpreter to make a virtual environment with."""

    path: str
    version: str
    has_venv: bool
    has_pip: bool


@dataclass(frozen=True)
class Plan:
    """What an installation would do: known from the pins, since pip's own dry run downloads all of it first.

    Args:
        environment: its name.
        python: the version of the interpreter that makes it, which is at `base`.
        installer: "pip" or "uv".
        packages: name to version.
        download_gigabytes, gigabytes: about what there is to download, and the space it takes then; 0: nobody knows.
    """

    environment: str
    python: str
    base: str
    installer: str
    packages: dict[str, str]
    download_gigabytes: float
    gigabytes: float


def plan(environment: Environment, *, python: str | None = None, uv: bool = False) -> Plan:
    """What `install` would do. Nothing is made, and no index asked.

    Raises:
        InputError: no interpreter of the version that the pins are for, or no uv.
    """
    return _plan(environment, find_base(environment, python), Uv() if uv else Pip())


def _plan(environment: Environment, base: Base, installer: Installer) -> Plan:
    return Plan(
        environment=environment.name,
        python=base.version,
        base=base.path,
        installer=installer.name,
        packages=environment.packages(),
        download_gigabytes=environment.download_gigabytes,
        gigabytes=environment.gigabytes,
    )


def install(
    environment: Environment,
    *,
    python: str | None,
    uv: bool,
    confirm: Callable[[Plan], bool],
    on_event: Events,
) -> bool:
    """Install `environment`, or renew it if its pins have changed.

    An earlier installation goes on counting until the new one is complete, and is removed then.

    Args:
        python: the interpreter to make it with; None takes the current one if its version fits, else one on the PATH.
        confirm: asked before anything is downloaded.
        on_event: gets progress and warnings, as a worker's events.

    Returns:
        False if it was installed already, or `confirm` said no.

    Raises:
        InputError, QtoolError: no interpreter, a pin that the indexes don't have, no space, a folder that can't be
            written, and whatever else keeps pip from installing.
        KeyboardInterrupt: the installation has been taken back.
    """

    def wait() -> None:
        on_event({"event": "warning", "message": f"another qtool is changing {environment.name}: waiting for it"})

    name = environment.name
    with store.locked(name, wait) as lock:
        base = find_base(environment, python) if python else None
        found = store.marker(name)
        if store.state(name) == store.INSTALLED and found and (base is None or base.version == found.python):
            return False
        base = base or find_base(environment, None)
        store.sweep(name)
        _check_space(environment)
        folder = store.new_build(name)
        installer: Installer = Uv() if uv else Pip()
        if not confirm(_plan(environment, base, installer)):
            return False
        with _taken_back(folder):
            made = Build(environment, base, installer, folder, on_event, lock.fileno()).run()
        store.commit(name, made)
        store.sweep(name)
    return True


class Build:
    """One virtual environment in the making, at the place where it stays."""

    def __init__(
        self,
        environment: Environment,
        base: Base,
        installer: Installer,
        folder: Path,
        on_event: Events,
        lock: int,
    ) -> None:
        self.environment = environment
        self.base = base
        self.installer = installer
        self.folder = folder
        self.on_event = on_event
        self.lock = lock
        self.log = workers.new_log(f"env-{environment.name}")
        self.python = store.interpreter_of(folder)
        self.total = len(environment.packages())
        self.last = self.error = ""

    def run(self) -> store.Marker:
        """Make the virtual environment, fill it, and check that what it is for is there."""
        name, installer = self.environment.name, self.installer
        _check_modules(self.base, installer)
        self._progress("creating", 0, 0)
        steps = [isolated_python(self.base.path, "-m", "venv", "--without-pip", str(self.folder))]
        if installer.needs_pip:  # a step of its own, so that its errors can be told
            steps.append(isolated_python(str(self.python), "-m", "ensurepip", "--default-pip"))
        if any(self._call(command) for command in steps):
            raise self._failure(f"can't make a virtual environment with {self.base.path}")
        pins = self.folder / "pins.txt"
        pins.write_text(self.environment.pins, encoding="utf-8")
        fallback = installer.fallback(self.environment)
        filled = self._fill(pins, [])
        if not filled and fallback and installer.not_found in self.error:
            message = f"{self.error}: trying again with {' '.join(fallback)}"
            self.on_event({"event": "warning", "message": message})
            filled = self._fill(pins, fallback)
        if not filled:
            raise self._failure(f"can't install {name}")
        if not store.has_package(self.folder, name):
            raise self._failure(f"{installer.name} installed {name}, but its package is not there")
        return store.Marker(
            build=self.folder.name,
            python=self.base.version,
            installer=installer.name,
            pins=self.environment.digest,
            bytes=used_space(self.folder),
            packages=store.packages(self.folder),
        )

    def _fill(self, pins: Path, more: list[str]) -> bool:
        taken, before = 0, len(store.packages(self.folder))

        def take(line: str) -> None:  # pip says so of each requirement in turn
            nonlocal taken
            if line.startswith(("Collecting ", "Processing ")):
                taken += 1
                self._progress("downloading", min(taken, self.total), self.total)

        def look() -> None:
            if (done := len(store.packages(self.folder)) - before) > 0:
                self._progress("installing", min(done, self.total), self.total)

        return self._call(self.installer.command(self.python, pins, more), take, look) == 0

    def _progress(self, stage: str, done: int, total: int) -> None:
        stage = f"{self.environment.name}: {stage}"
        self.on_event({"event": "progress", "stage": stage, "done": done, "total": total, "unit": "packages"})

    def _call(
        self,
        command: list[str],
        on_line: Callable[[str], None] = lambda line: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> int:
        self.last = self.error = ""
        with self.log.open("a", encoding="utf-8") as log:
            print(f"$ {' '.join(command)}", file=log, flush=True)

            def keep(line: str) -> None:
                print(line, file=log, flush=True)
                self.last = line.strip() or self.last
                if line.lower().startswith("error:"):
                    self.error = line.partition(":")[2].strip()
                elif self.error and line.strip().startswith("cause:"):  # how uv goes on
                    self.error += f": {line.partition(':')[2].strip()}"
                on_line(line)

            return commands.run(command, on_line=keep, on_tick=on_tick, env=PIP_VARIABLES, inherit=[self.lock])

    def _failure(self, what: str) -> QtoolError:
        said = self.error or self.last
        if "No space left" in said or "Disk quota" in said:
            hint = f"{store.ELSEWHERE}  (log: {self.log})"
        elif self.environment.elsewhere and self.installer.not_found in said:
            hint = f"{self.environment.elsewhere}  (log: {self.log})"
        else:
            hint = f"The log has the details: {self.log}"
        return QtoolError(f"{what}: {said[:500]}", where=str(self.folder.parent), hint=hint)


@contextlib.contextmanager
def _taken_back(folder: Path) -> Iterator[None]:
    """Remove `folder` if what is done in it fails or is interrupted."""
    try:
        with disk_errors(folder.parent, hint=store.ELSEWHERE):
            folder.parent.mkdir(exist_ok=True)
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # if nothing else is there
        raise


def _check_space(environment: Environment) -> None:
    needed, free = environment.gigabytes * 1e9, free_space(store.root())
    if free < needed:
        raise QtoolError(
            f"{environment.name} takes about {environment.gigabytes:g} GB, {free / 1e9:.1f} GB are free",
            where=str(store.root()),
            hint=store.ELSEWHERE,
        )


def find_base(environment: Environment, named: str | None) -> Base:
    """The interpreter to make `environment` with.

    Raises:
        InputError: `named` is no Python, or of a version that the pins are not for; or without it, none was found.
    """
    if named is not None:
        path = shutil.which(os.path.expanduser(named))
        base = _probe(os.path.abspath(path)) if path else None
        if base is None:
            raise InputError("not a Python interpreter", where=f"--python {named}")
        if not _fits(base, environment):
            what = f"the pins of {environment.name} are for Python {environment.python}, this is {base.version}"
            raise InputError(what, where=f"--python {named}")
        return base
    for path in (sys.executable, shutil.which(f"python{environment.python}")):
        base = _probe(path) if path else None
        if base and _fits(base, environment):
            return base
    raise InputError(
        f"{environment.name} needs Python {environment.python}, which is not on the PATH",
        hint="Name one: --python /path/to/python" + environment.python,
    )


def _fits(base: Base, environment: Environment) -> bool:
    return base.version.split(".")[:2] == environment.python.split(".")


def _check_modules(base: Base, installer: Installer) -> None:
    if base.has_venv and (base.has_pip or not installer.needs_pip):
        return
    missing = "ensurepip, and so pip" if base.has_venv else "venv"
    hint = f"On Debian and Ubuntu: apt install python{base.version.rpartition('.')[0]}-venv"
    raise QtoolError(f"this Python lacks the module {missing}", where=base.path, hint=hint)


def _probe(path: str) -> Base | None:
    """What the interpreter at `path` is, or None if it is none."""
    command = isolated_python(path, "-c", PROBE)
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, TypeError):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=True)
        return Base(path, *json.loads(done.stdout))
    return None
