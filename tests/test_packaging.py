"""What pyproject.toml promises: pins that fit, no CUDA, and data that is where the code looks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qtool import resources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    pinned = pins()
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_the_pins_bring_no_cuda() -> None:
    pinned = pins()
    assert pinned["torch"].endswith("+cpu")
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "cupy"))]


def test_the_data_the_wheel_ships_is_what_a_checkout_has() -> None:
    shipped = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {name: f"qtool/_data/{name}" for name in ("recipes", "configs")}
    for name in shipped:
        assert {path.name for path in resources.folder(name).iterdir()} == {p.name for p in (ROOT / name).iterdir()}


Clean = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """clean(*args) -> `qtool ARGS` where nothing but the wheel and what it requires is installed: no torch."""
    folder = tmp_path_factory.mktemp("clean")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("QTOOL_", "PYTHONPATH"))}
    env |= {"HOME": str(folder), "XDG_DATA_HOME": str(folder / "data"), "XDG_CONFIG_HOME": str(folder / "config")}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)

    def pip(python: Path, *args: object) -> None:
        own = {**os.environ, "PYTHONPATH": ""}
        command = [python, "-m", "pip", "--disable-pip-version-check", *args]
        done = subprocess.run([*map(str, command)], env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    pip(Path(sys.executable), "wheel", "--no-deps", "--wheel-dir", folder / "dist", ROOT)
    assert run(sys.executable, "-m", "venv", folder / "env").returncode == 0
    (wheel,) = (folder / "dist").glob("qtool-*.whl")
    pip(folder / "env/bin/python", "install", wheel)
    return lambda *args: run(folder / "env/bin/qtool", *args)


@pytest.mark.slow
def test_the_wheel_alone_works_and_offers_the_extra(clean: Clean, tiny_llama: Path) -> None:
    assert clean("--help").returncode == 0
    assert "llama3" in clean("recipes", "list").stdout
    assert clean("inspect", tiny_llama, "--json").returncode == 0
    for command in (
        ("quantize", tiny_llama),
        ("generate", tiny_llama, "--prompt", "x"),
        ("analyze", tiny_llama),
        ("tune", tiny_llama, "--max-size", "102%"),
        ("eval", tiny_llama, tiny_llama, "--windows", "1"),
    ):
        done = clean(*command)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        if command[0] != "eval":  # it refuses a model against itself first
            assert "pip install 'qtool[native]'" in done.stderr


@pytest.mark.slow
def test_doctor_ends_with_the_one_command(clean: Clean) -> None:
    done = clean("doctor")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "To do: pip install 'qtool[native]'"
