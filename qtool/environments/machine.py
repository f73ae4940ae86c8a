"""What this machine has: cores, memory, disk, accelerators. Read from the system, without importing or running any."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_BLACKWELL = re.compile(r"\bG?B[123]00\b|\bRTX 50\d\d\b|\bBlackwell\b|\bGB10\b")
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_FOLDERS = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann", "usr/local/Ascend/nnrt/latest")


def cpus() -> int:
    """How many CPUs this process may keep busy: a container's quota counts, not what the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max"
        return allowed


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says that the processor can do; empty where it says nothing of the kind, as on ARM."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0]
        return set(flags.partition(":")[2].split())
    except OSError:
        return set()


def memory() -> dict[str, int] | None:
    """`total_bytes` and `available_bytes`, the smaller of the machine's and the container's; None off Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = values["MemTotal"], values["MemAvailable"]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return {"total_bytes": total, "available_bytes": free}
    return {"total_bytes": min(total, limit), "available_bytes": max(0, min(free, limit - used))}


def has_cuda(root: Path = Path("/")) -> bool:
    """Whether NVIDIA's driver is loaded."""
    return (root / "dev/nvidiactl").exists()


def cuda(root: Path = Path("/")) -> dict[str, Any] | None:
    """NVIDIA's `driver` version and the number of `devices`, or None. `root` is where /dev and /proc are."""
    if not has_cuda(root):
        return None
    devices = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return {"driver": _version(root / "proc/driver/nvidia/version", r"Module\s+(\S+)"), "devices": len(devices)}


def is_blackwell(root: Path = Path("/")) -> bool:
    """Whether a GPU here is of NVIDIA's Blackwell generation, by what its driver calls it."""
    for file in root.glob("proc/driver/nvidia/gpus/*/information"):
        try:
            model = re.search(r"(?m)^Model:\s*(.*)", file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if model and _BLACKWELL.search(model[1]):
            return True
    return False


def ascend(root: Path = Path("/")) -> dict[str, Any] | None:
    """The number of NPU `devices`, the `driver`'s version and `cann`'s version and folder, or None without any."""
    devices = [path for path in (root / "dev").glob("davinci*") if re.fullmatch(r"davinci\d+", path.name)]
    named = [Path(os.environ[name]) for name in CANN_VARIABLES if os.environ.get(name)]
    homes = [home for home in (*named, *(root / folder for folder in CANN_FOLDERS)) if home.is_dir()]
    if not devices and not homes:
        return None
    return {
        "devices": len(devices),
        "driver": _version(root / "usr/local/Ascend/driver/version.info", r"(?im)^Version\s*=\s*(\S+)"),
        "cann": _cann_version(homes[0]) if homes else None,
        "cann_home": str(homes[0]) if homes else None,
    }


def _cann_version(home: Path) -> str:
    for file in [*sorted(home.glob("*/ascend_toolkit_install.info")), *sorted(home.glob("**/version.info"))]:
        if version := _version(file, r"(?im)^version\s*=\s*(\S+)"):
            return version
    return "unknown version"


def _version(file: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found.group(1).strip("[]") if found else None
