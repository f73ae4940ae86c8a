"""The worker process that measures sensitivities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `sensitivity.measure_model`: a `SensitivityJob` and `Sensitivities`, both as JSON."""
    hide_media_packages()
    from qtool.tuning.job import SensitivityJob
    from qtool.tuning.measure import measure

    return measure(SensitivityJob.from_json(job), report).to_json()
