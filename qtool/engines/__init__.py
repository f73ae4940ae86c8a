"""Who quantizes: the native engine (torch, anywhere) and Golden Stick (mindspore-gs, at home on Ascend)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qtool import workers

if TYPE_CHECKING:
    from qtool.engines.job import QuantizationJob
    from qtool.engines.report import DryRun, QuantizationResult

    OnEvent = Callable[[workers.Event], None]

_ASCEND = Path("/dev/davinci_manager")


def choose(job: QuantizationJob) -> tuple[str, str]:
    """The engine for a job on this machine, and why: Golden Stick on Ascend, where it is installed and can do the job.

    Raises InputError for a damaged checkpoint.
    """
    if not _ASCEND.exists():
        return "native", "no Ascend NPU here"
    from qtool.engines.golden_stick import engine as golden_stick
    from qtool.environments.lookup import locate

    if locate("golden-stick") is None:
        return "native", "this machine has Ascend NPUs, but no mindspore-gs"
    if (reason := golden_stick.beyond(job)) is not None:
        return "native", f"this machine has Ascend NPUs, but {reason}"
    return "golden-stick", "this machine has Ascend NPUs"


def quantize(engine: str, job: QuantizationJob, on_event: OnEvent) -> QuantizationResult:
    """Have `engine` ("native" or "golden-stick") do a job.

    Raises:
        InputError, QtoolError: as the engine does.
    """
    if engine == "golden-stick":
        from qtool.engines.golden_stick import engine as golden_stick

        return golden_stick.quantize(job, on_event)
    from qtool.engines import native

    return native.quantize(job, on_event)


def dry_run(engine: str, job: QuantizationJob, on_event: OnEvent) -> DryRun:
    """What `quantize` would do. Raises InputError and QtoolError as the engine does."""
    if engine == "golden-stick":
        from qtool.engines.golden_stick import engine as golden_stick

        return golden_stick.dry_run(job, on_event)
    from qtool.engines import native

    return native.dry_run(job, on_event)
