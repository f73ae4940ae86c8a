"""What the machine has, against the system's own tools and against made-up devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qtool.environments import machine


@pytest.fixture(autouse=True)
def _no_cann_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.CANN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def write(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_cores_and_memory_are_no_more_than_the_machine_has() -> None:
    assert 1 <= machine.cpus() <= int(subprocess.check_output(["nproc", "--all"]))
    memory = machine.memory()
    assert memory is not None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory["available_bytes"] <= memory["total_bytes"] <= total


def test_no_accelerator(tmp_path: Path) -> None:
    write(tmp_path / "dev/null")
    assert machine.cuda(tmp_path) is None
    assert machine.ascend(tmp_path) is None


def test_cuda(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        write(tmp_path / "dev" / name)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\n"
    write(tmp_path / "proc/driver/nvidia/version", line)
    assert machine.cuda(tmp_path) == {"driver": "570.86.15", "devices": 2}


def test_ascend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("davinci0", "davinci1", "davinci7", "davinci_manager"):
        write(tmp_path / "dev" / name)
    found = machine.ascend(tmp_path)
    assert found == {"devices": 3, "driver": None, "cann": None, "cann_home": None}

    write(tmp_path / "usr/local/Ascend/driver/version.info", "Version=25.2.0\nascendhal_version=7.35\n")
    home = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    write(home / "aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\n")
    found = machine.ascend(tmp_path)
    assert found == {"devices": 3, "driver": "25.2.0", "cann": "8.3.RC1", "cann_home": str(home)}

    other = tmp_path / "opt/cann"
    write(other / "compiler/version.info", "Version=8.5.0\nversion_dir=8.5.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(other))
    found = machine.ascend(tmp_path)
    assert found is not None
    assert (found["cann"], found["cann_home"]) == ("8.5.0", str(other))


@pytest.mark.parametrize(
    ("models", "is_one"),
    [
        (("NVIDIA B200",), True),
        (("NVIDIA GeForce RTX 5090",), True),
        (("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",), True),
        (("NVIDIA H100 80GB HBM3", "NVIDIA GB300"), True),
        (("NVIDIA H200",), False),
        (("NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"), False),
        ((), False),
    ],
)
def test_blackwell_is_known_by_its_names(models: tuple[str, ...], is_one: bool, tmp_path: Path) -> None:
    for number, model in enumerate(models):
        folder = tmp_path / f"proc/driver/nvidia/gpus/0000:{number:02}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 120\n")
    assert machine.is_blackwell(tmp_path) == is_one
