"""Evaluation figures in qtool.json, and on the model card made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError
from qtool.evaluation.record import keep
from qtool.hub.card import card

ESTIMATE = {"value": 0.00625, "low": 0.0058, "high": 0.0067}
RESULT: dict[str, Any] = {
    "base": "/home/somebody/secret-project/smol",
    "quantized": "/home/somebody/secret-project/smol-w8a8",
    "text": {"source": "tail.txt", "sha256": "00", "windows": 24, "length": 512},
    "runtime": {"name": "vllm", "dtype": "bfloat16"},
    **{key: {"value": 24.187, "low": 21.7, "high": None} for key in ("base_perplexity", "quantized_perplexity")},
    **dict.fromkeys(("perplexity_ratio", "kl_divergence", "kl_median", "kl_p99"), ESTIMATE),
    "kl_max": {"value": 0.4, "window": 1, "position": 2},
    **{key: {"value": 0.9524, "low": 0.948, "high": 0.957} for key in ("top1_agreement", "top5_agreement")},
    "seconds": 1.0,
}


def test_the_rest_of_the_report_stays(tmp_path: Path) -> None:
    file = tmp_path / "qtool.json"
    file.write_text(json.dumps({"scheme": "w8a8", "layers": [{"linears": ["q"]}], "evaluation": {"old": 1}}))
    file.chmod(0o640)
    assert keep(tmp_path, RESULT) is None
    report = json.loads(file.read_text())
    assert report["scheme"] == "w8a8"
    assert report["layers"] == [{"linears": ["q"]}]
    assert report["evaluation"]["kl_divergence"] == ESTIMATE
    assert "old" not in report["evaluation"]
    assert "somebody" not in file.read_text()  # what is uploaded says nothing about this machine
    assert file.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["qtool.json"]


def test_a_folder_without_a_report_stays_as_it_is(tmp_path: Path) -> None:
    assert keep(tmp_path, RESULT) == "it has no qtool.json"
    assert list(tmp_path.iterdir()) == []


def test_a_downloaded_folder_still_verifies(tmp_path: Path) -> None:
    (tmp_path / "qtool.json").write_text("{}")
    (tmp_path / "qtool.lock.json").write_text("{}")
    assert "hashes" in (keep(tmp_path, RESULT) or "")
    assert (tmp_path / "qtool.json").read_text() == "{}"


def test_a_damaged_report(tmp_path: Path) -> None:
    (tmp_path / "qtool.json").write_text('{"scheme": ')
    with pytest.raises(InputError, match="not valid JSON"):
        keep(tmp_path, RESULT)
    assert (tmp_path / "qtool.json").read_text() == '{"scheme": '


def test_the_card_shows_the_figures(tmp_path: Path) -> None:
    (tmp_path / "qtool.json").write_text("{}")
    keep(tmp_path, RESULT)
    text = card("name", json.loads((tmp_path / "qtool.json").read_text()), "")
    assert "| KL divergence from the base model, nats per token | 0.0063 (0.0058 to 0.0067) |" in text
    assert "| perplexity | 24.19 |" in text  # an interval with one end is none
    assert "| same likeliest token as the base model | 95.2% (94.8% to 95.7%) |" in text
    assert "| evaluated on | 24 x 512 tokens of tail.txt, in vllm |" in text


def test_a_strange_evaluation_breaks_no_card() -> None:
    strange: Any
    for strange in (1, [], "x", {"kl_divergence": "x"}, {"kl_divergence": {"value": None}, "text": 1}):
        assert "KL" not in card("name", {"evaluation": strange}, "")
