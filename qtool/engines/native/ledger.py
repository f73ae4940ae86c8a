"""What of the work is finished, and what whoever resumes it needs: records in the output's journal, files beside it.

Units are finished in the order of the layers, so records of units belong to the first layer that has no record itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.writer import CheckpointWriter
from qtool.engines.report import ExpertTokens, QuantizedGroup
from qtool.quant.report import GroupReport

DENSE = "dense"  # the unit of a layer's linears without its routed experts
_LAYER = "layer"
_IMPORTANCE = "importance"  # that of all linears, found before the first layer is quantized


@dataclass(frozen=True)
class LayerEnd:
    """What is known of a decoder layer when all of it is written.

    Attributes:
        name: of the layer.
        hidden, leaving: the files of the activations that entered and that left it.
        reports: of groups that belong to no unit.
        experts: what its routed experts saw, if it has any.
    """

    name: str
    hidden: Path
    leaving: Path
    reports: Sequence[GroupReport]
    experts: Sequence[ExpertTokens]


class Ledger:
    """The finished work of one job.

    Args:
        writer: keeps the records, and has those of the run that this one resumes.

    Attributes:
        layers: how many decoder layers are finished, the first ones.
        groups, experts: of these layers, for the report.
        folder: for files that must survive as long as the records do.
        is_weighed: the importance of all linears is known, in files there.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer
        self._units: dict[str, list[GroupReport]] = {}
        self.folder = writer.folder
        self.layers = 0
        self.is_weighed = False
        self.groups: list[QuantizedGroup] = []
        self.experts: list[ExpertTokens] = []
        for record in writer.records:
            if record["unit"] == _LAYER:
                groups = [QuantizedGroup(**row) for row in record["rows"]]
                self._count_layer(groups, [ExpertTokens(**row) for row in record["experts"]])
            elif record["unit"] == _IMPORTANCE:
                self.is_weighed = True
            else:
                self._units[record["unit"]] = [GroupReport(**row) for row in record["rows"]]

    def is_finished(self, layer: int, unit: str) -> bool:
        """Whether a unit of a layer is written."""
        return layer < self.layers or (layer == self.layers and unit in self._units)

    def finish_importance(self, files: Sequence[Path]) -> None:
        """The importance of all linears is in these files."""
        self.is_weighed = True
        self._writer.mark({"unit": _IMPORTANCE}, needs=files)

    def finish_unit(self, unit: str, reports: list[GroupReport]) -> None:
        """A unit of the first unfinished layer is written, and came out so."""
        self._units[unit] = reports
        self._writer.mark({"unit": unit, "rows": [asdict(report) for report in reports]})

    def finish_layer(self, end: LayerEnd) -> None:
        """All of the first unfinished layer is written."""
        reports = [
            *end.reports,
            *self._units.get(DENSE, []),
            *_summarized([report for unit, found in self._units.items() if unit != DENSE for report in found]),
        ]
        groups = [QuantizedGroup(layer=end.name, **asdict(report)) for report in reports]
        record: dict[str, Any] = {
            "unit": _LAYER,
            "layer": self.layers,
            "rows": [group.to_json() for group in groups],
            "experts": [asdict(layer) for layer in end.experts],
        }
        self._count_layer(groups, end.experts)
        self._writer.mark(record, needs=[end.leaving], obsolete=[end.hidden])

    def _count_layer(self, groups: Sequence[QuantizedGroup], experts: Sequence[ExpertTokens]) -> None:
        self._units = {}  # before `layers`: another thread may ask meanwhile
        self.groups += groups
        self.experts += experts
        self.layers += 1


def _summarized(reports: list[GroupReport]) -> list[GroupReport]:
    """One report for the same group of all experts, with the mean of their errors and the widest of their ranges."""
    by_group: dict[tuple[str, ...], list[GroupReport]] = {}
    for report in reports:
        by_group.setdefault(tuple(report.linears), []).append(report)
    return [
        GroupReport(
            linears=[f"experts.*.{linear}" for linear in linears],
            activations=same[0].activations,
            smoothing=same[0].smoothing,
            alpha=None,
            relative_error=sum(report.relative_error for report in same) / len(same),
            input=_combined([report.input for report in same]),
            smoothed=_combined([report.smoothed for report in same]),
        )
        for linears, same in by_group.items()
    ]


def _combined(ranges: list[dict[str, float]]) -> dict[str, float]:
    return {
        "low": min(range_["low"] for range_ in ranges),
        "high": max(range_["high"] for range_ in ranges),
        "typical": sum(range_["typical"] for range_ in ranges) / len(ranges),
    }
