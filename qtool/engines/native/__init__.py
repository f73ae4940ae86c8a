"""The native engine: torch, one decoder layer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qtool import workers
from qtool.environments.lookup import interpreter

if TYPE_CHECKING:
    from qtool.engines.job import QuantizationJob
    from qtool.engines.report import DryRun, QuantizationResult

    OnEvent = Callable[[workers.Event], None]

_SETTINGS = {
    # One heap that keeps what it has: mapping every tensor anew costs a third of the time in page faults
    # (SmolLM2, 6 layers: 13.2 s at 0.66 GB with a threshold of 0.5 MB, 9.8 s at 0.75 GB with this one).
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "134217728",
    # A thread that spins for long starves the others where cores are shared; one that sleeps at once wakes too late.
    "GOMP_SPINCOUNT": "20000",
    # oneDNN and torch keep 1024 compiled products each, one for every shape, and no two experts get as many tokens:
    # 16 layers with experts of a small DeepSeek-V3 grew to 1.27 GB with them, and stay at 0.89 GB with these.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
    "LRU_CACHE_CAPACITY": "8",
}


def environment() -> dict[str, str]:
    """Variables that the engine's worker should be started with; what the user has set stays."""
    return {name: value for name, value in _SETTINGS.items() if name not in os.environ}


def quantize(job: QuantizationJob, on_event: OnEvent) -> QuantizationResult:
    """Do a job in a process that has torch. Raises InputError and QtoolError as that does."""
    from qtool.engines.report import QuantizationResult

    return QuantizationResult.from_json(_run(job, on_event, dry_run=False))


def dry_run(job: QuantizationJob, on_event: OnEvent) -> DryRun:
    """What `quantize` would do."""
    from qtool.engines.report import DryRun

    return DryRun.from_json(_run(job, on_event, dry_run=True))


def _run(job: QuantizationJob, on_event: OnEvent, *, dry_run: bool) -> dict[str, Any]:
    message = {"job": job.to_json(), "dry_run": dry_run}
    python, env = interpreter("native"), environment()
    return workers.run("qtool.engines.native.worker", message, python=python, on_event=on_event, env=env)
