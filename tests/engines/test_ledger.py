"""What is finished, as somebody finds it who resumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from qtool.checkpoint import formats
from qtool.checkpoint.writer import CheckpointWriter, Resume
from qtool.engines.native.ledger import DENSE, LayerEnd, Ledger
from qtool.engines.report import ExpertTokens
from qtool.errors import QtoolError
from qtool.quant.layer import GroupReport


def report(linear: str, error: float, low: float) -> GroupReport:
    range_ = {"low": low, "high": 1.0, "typical": 0.5}
    return GroupReport([linear], "static", "osl", 0.5, error, range_, range_)


@contextmanager
def struck(output: Path) -> Iterator[CheckpointWriter]:
    """A writer that goes on where the one before it was struck, and is struck itself when the block ends."""
    resume = Resume("key", wanted=True)
    with suppress(QtoolError), CheckpointWriter(output, formats.get("modelslim"), resume=resume) as writer:
        yield writer
        raise QtoolError("struck")


def test_finished_work_is_known_to_whoever_resumes(tmp_path: Path) -> None:
    tokens = ExpertTokens("model.layers.0", [5, 0], {"1": 2})
    with struck(tmp_path / "out") as writer:
        ledger = Ledger(writer)
        writer.add("model.norm.weight", torch.ones(4))
        hidden, leaving = ledger.folder / "hidden-0", ledger.folder / "hidden-1"
        hidden.touch()
        leaving.touch()
        assert not ledger.is_finished(0, DENSE)
        ledger.finish_unit("experts 0 to 0", [report("up_proj", 0.2, -1.0)])
        ledger.finish_unit(DENSE, [report("mlp.gate", 0.1, -3.0)])
        ledger.finish_unit("experts 1 to 1", [report("up_proj", 0.4, -2.0)])
        assert ledger.is_finished(0, DENSE)
        ledger.finish_layer(LayerEnd("model.layers.0", hidden, leaving, [], [tokens]))
        assert ledger.is_finished(0, DENSE)
        assert not ledger.is_finished(1, DENSE)
        ledger.finish_unit(DENSE, [report("mlp.gate", 0.3, -1.0)])
    with struck(tmp_path / "out") as writer:
        resumed = Ledger(writer)
    assert (resumed.layers, resumed.groups, resumed.experts) == (1, ledger.groups, [tokens])
    assert resumed.is_finished(1, DENSE)
    assert not resumed.is_finished(1, "experts 0 to 0")
    dense, experts = resumed.groups
    assert (dense.layer, dense.linears, dense.alpha) == ("model.layers.0", ["mlp.gate"], 0.5)
    # The same group of all experts is one row: its mean error, its widest range.
    assert (experts.linears, experts.alpha) == (["experts.*.up_proj"], None)
    assert experts.relative_error == pytest.approx(0.3)
    assert experts.input == {"low": -2.0, "high": 1.0, "typical": 0.5}
