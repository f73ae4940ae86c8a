"""The evaluation's worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.workers import hide

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `comparison.compare`."""
    hide("torchaudio", "torchvision")  # no text model needs them, and builds for another torch break transformers
    from qtool.evaluate.comparison import compare

    return compare(job, report)
