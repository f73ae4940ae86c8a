"""The native engine's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `engine.quantize`."""
    hide_media_packages()
    from qtool.engines.native.engine import quantize

    return quantize(job, report)
