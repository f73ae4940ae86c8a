"""The native engine: torch, one decoder layer at a time."""

from __future__ import annotations

import os

_SETTINGS = {
    # glibc otherwise learns to keep large freed blocks, which adds a third to the peak.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "524288",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    # Threads that spin while they wait starve the others wherever cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def environment() -> dict[str, str]:
    """Variables that the engine's worker should be started with; what the user has set stays."""
    return {name: value for name, value in _SETTINGS.items() if name not in os.environ}
