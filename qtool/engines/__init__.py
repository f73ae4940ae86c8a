"""Who quantizes: the native engine (torch, anywhere) and Golden Stick (mindspore-gs, at home on Ascend)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.environments.lookup import interpreter

_ASCEND = Path("/dev/davinci_manager")


def choose() -> tuple[str, str]:
    """The engine for this machine, and why."""
    if _ASCEND.exists():
        return "golden-stick", "this machine has Ascend NPUs"
    return "native", "no Ascend NPU here"


def run(engine: str, job: dict[str, Any], on_event: Callable[[workers.Event], None]) -> dict[str, Any]:
    """Have `engine` ("native" or "golden-stick") do a job; the result is the report, or for a dry run the plan.

    Raises:
        InputError, QtoolError: as the engine does.
    """
    if engine == "golden-stick":
        from qtool.engines.golden_stick.engine import quantize

        return quantize(job, on_event)
    from qtool.engines import native

    python, env = interpreter("native"), native.environment()
    return workers.run("qtool.engines.native.worker", job, python=python, on_event=on_event, env=env)
