"""Every family that a recipe ships for, in every scheme: read by its runtimes' own loading code, tensor by tensor.

Wanted is that each tensor of the files is looked into, and each parameter of the model filled from them; where that is
not so, qtool says so beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import Sharding
from qtool.runtimes import facts, readings, table
from tests import families
from tests.checkpoint import served
from tests.checkpoint.readings import READERS, Reader, make, read, run

_MARKS = {"vllm": pytest.mark.vllm, "transformers": pytest.mark.slow}


def _marked() -> list[Any]:
    marks = (_MARKS.get(reader.runtime, pytest.mark.peers) for reader in READERS)
    return [
        pytest.param(each, marks=mark, id=f"{each.script}-{each.format}")
        for each, mark in zip(READERS, marks, strict=True)
    ]


def test_the_table_says_what_was_read() -> None:
    """What the runtimes' own code made of the files is the answer that qtool gives of them."""
    answers = {
        (row.runtime, row.format, model, scheme): (row.answer, row.checked)
        for row in table.rows()
        for model in row.models
        for scheme in row.schemes
    }
    titles = {runtime.name: runtime.title for runtime in facts.KNOWN}
    for reading in readings.READINGS:
        found = answers[titles[reading.runtime], reading.format, reading.architecture, reading.scheme]
        assert found == (("yes", "run") if reading.well else ("no", "run")) or found == ("with a setting", "run"), (
            reading
        )
        assert reading.counts.parameters or reading.error
    assert {reader.runtime for reader in READERS} == {reading.runtime for reading in readings.READINGS}


@pytest.mark.parametrize("reader", _marked())
def test_every_family(reader: Reader, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The runtime's own code finds what is written down of it in qtool/runtimes/readings.py."""
    folders = make(reader, tmp_path, tiny_tokenizer)
    found = read(reader, folders, tmp_path / "work")
    known = {(each.runtime, each.format, each.architecture, each.scheme): each for each in readings.READINGS}
    assert len(found) > 2
    for reading, line in found:
        assert reading == known[reading.runtime, reading.format, reading.architecture, reading.scheme], line


@pytest.mark.peers
def test_the_last_norm_is_the_models_own(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """MindFormers loads that of DeepSeek-V3's layer 61, which predicts one token further, into the same parameter."""
    (reader,) = (each for each in READERS if each.script == "mindformers_reads.py")
    model = served.make("DeepseekV3ForCausalLM", tmp_path / "float", tiny_tokenizer)
    norm, further = "model.norm.weight", "model.layers.61.shared_head.norm.weight"
    tensors = families.load(model)
    tensors |= {norm: torch.full_like(tensors[norm], 2), further: torch.full_like(tensors[norm], 3)}
    # as they lie in the files of DeepSeek-R1: one in an early file, one in the last
    early = dict(list(tensors.items())[:20]) | {norm: tensors.pop(norm)}
    families.save({name: tensor for name, tensor in tensors.items() if name not in early} | early, model, shards=3)
    served.quantize(model, tmp_path / "made", "golden-stick", "w8a8", Sharding(700_000, 64))
    made = Checkpoint.open(tmp_path / "made")
    assert len({made.info(name).file for name in made.names}) > 1
    assert made.info(norm).file == made.info(further).file
    (line,) = run(reader, [tmp_path / "made"], tmp_path / "work")
    assert line["norm"] == 2
    assert not line["untouched"]
