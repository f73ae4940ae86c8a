"""The native engine's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(message: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a job: {"job": a `QuantizationJob`, "dry_run": whether only to say what it would do}."""
    hide_media_packages()
    from qtool.calibration.sources import SELF
    from qtool.engines.job import QuantizationJob
    from qtool.engines.native.execute import checked, execute
    from qtool.engines.native.prepare import prepare

    prepared = prepare(QuantizationJob.from_json(message["job"]), report)
    if not message["dry_run"]:
        return execute(prepared, report).to_json()
    if prepared.job.calibration.data != SELF:  # the model has not written its own text yet
        checked(prepared)
    return prepared.dry_run().to_json()
