"""What pyproject.toml promises: pins that fit, no CUDA, and data that is where the code looks for it."""

from __future__ import annotations

import tomllib
from pathlib import Path

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
