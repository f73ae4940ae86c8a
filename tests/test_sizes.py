"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest

from qtool import sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12345", 12345), ("0.5kB", 500), ("123B", 123), ("4GB", 4 * 10**9), ("1.5 TB", 1_500_000_000_000),
        ("1PB", 10**15), ("500MiB", 500 * 2**20), (" 2 gib ", 2 * 2**30), ("3k", 3000), ("1K", 1000),
        (".5G", 5 * 10**8),
    ],
)  # fmt: skip
def test_what_is_a_size(text: str, expected: int) -> None:
    assert sizes.parse(text) == expected


@pytest.mark.parametrize("text", ["", "B", "GB", "much", "-1", "+1", "1e9", "1 0", "4GBB", "0", "0.0001", "٤GB"])
def test_what_is_none(text: str) -> None:
    assert sizes.parse(text) is None


def test_bytes_have_a_unit_that_suits_them() -> None:
    assert [sizes.show(n) for n in (0, 999, 1000, 1_234_567, 7e11, 5e15)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "700.0 GB", "5000.0 TB",
    ]  # fmt: skip
