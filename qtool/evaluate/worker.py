"""The evaluation's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `comparison.compare`."""
    hide_media_packages()
    from qtool.evaluate.comparison import compare

    return compare(job, report)
