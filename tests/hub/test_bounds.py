"""Bounds of what a hub may send, by a clock of the test's own and by real threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError, QtoolError
from qtool.hub import bounds
from qtool.hub.bounds import Answer, Pace, Requests, check_encoding
from qtool.hub.listing import Listing, RemoteFile
from qtool.hub.patience import Again, Patience
from qtool.hub.transfer import fetch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_files_must_move_on() -> None:
    clock = Clock()
    pace = Pace(least=100, window=60, clock=clock)
    with pace.transfer("org/model/a"):
        clock.now = 59
        pace.check()  # not yet a whole window
        pace.moved(100)
        clock.now = 61
        pace.check()
        clock.now = 120
        pace.moved(99)
        pace.check()
        clock.now = 122
        with pytest.raises(QtoolError, match="only 99 bytes in 61 seconds") as raised:
            pace.check()
        assert raised.value.where == "org/model/a"
    clock.now = 500
    pace.check()  # nobody waits for it any more


def test_an_answer_that_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer("hub")
    answer.take(bounds.MOST_BYTES)
    with pytest.raises(InputError, match="more than 64 MB"):
        answer.take(1)
    monkeypatch.setattr(bounds, "MOST_SECONDS", -1.0)
    with pytest.raises(Again, match="too slowly"):
        Answer("hub").take(1)


def test_requests_of_a_listing_end_and_others_do_not() -> None:
    requests = Requests()
    for _ in range(bounds.MOST_ANSWERS + 10):
        requests.one_more("hub")
    with requests.of_listing():
        for _ in range(bounds.MOST_ANSWERS):
            requests.one_more("hub")
        with pytest.raises(InputError, match="its listing has more than"):
            requests.one_more("hub")


@pytest.mark.parametrize(
    ("encoding", "right"), [(None, True), ("", True), ("Identity", True), ("gzip", False), ("br", False)]
)
def test_compressed_answers_are_refused(encoding: str | None, right: bool) -> None:
    if right:
        check_encoding(encoding, "hub")
    else:
        with pytest.raises(QtoolError, match="were asked for"):
            check_encoding(encoding, "hub")


def test_a_file_that_drips_ends_the_download(tmp_path: Path) -> None:
    """Its thread waits for bytes and can be told nothing; the download ends all the same."""
    dripping, release = threading.Event(), threading.Event()

    class Dripping:
        stop = threading.Event()

        def fetch(self, listing: Listing, file: RemoteFile, sink: Any) -> None:
            sink.write(b"x")
            dripping.set()
            release.wait()

    listing = Listing("huggingface", "", "org/model", "main", "0" * 40, (RemoteFile("a.json", 1000, "0" * 64),))
    hub: Any = Dripping()
    try:
        with pytest.raises(QtoolError, match="only 1 bytes in"):
            fetch(
                hub, listing, tmp_path, lambda *_: None, workers=2, patience=Patience(), pace=Pace(least=10, window=0.2)
            )
    finally:
        release.set()
    assert dripping.is_set()
    assert hub.stop.is_set()
