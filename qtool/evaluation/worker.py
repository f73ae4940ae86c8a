"""The evaluation's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `comparison.compare`: a `ComparisonJob` and, under "comparisons", a `Comparison` of each model, as JSON."""
    hide_media_packages(keep_torchvision=bool(job["vllm"]))
    from qtool.evaluation.comparison import compare
    from qtool.evaluation.job import ComparisonJob

    return {"comparisons": [found.to_json() for found in compare(ComparisonJob.from_json(job), report)]}
