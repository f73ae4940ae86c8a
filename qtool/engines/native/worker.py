"""The native engine's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(message: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a job: {"job": a `QuantizationJob`, "dry_run": whether only to say what it would do}."""
    hide_media_packages()
    from qtool.engines.job import QuantizationJob
    from qtool.engines.native.execute import execute
    from qtool.engines.native.prepare import prepare

    prepared = prepare(QuantizationJob.from_json(message["job"]), report)
    return prepared.dry_run().to_json() if message["dry_run"] else execute(prepared, report).to_json()
