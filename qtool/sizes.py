"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

_POWERS = "kMGTP"
_SIZE = re.compile(rf"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([{_POWERS}])(i?))?B?\s*", re.ASCII | re.IGNORECASE)


def parse(text: str) -> int | None:
    """Bytes of a size such as 4GB, 1.5 TB, 500MiB or 12345; None if it is not a size, or less than a byte."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    power = _POWERS.lower().index(found[2].lower()) + 1 if found[2] else 0
    return round(float(found[1]) * (1024 if found[3] else 1000) ** power) or None


def show(nbytes: float) -> str:
    """A number of bytes in the unit that suits it: 999 bytes, 1.2 kB, 165.0 MB, 4.0 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while nbytes >= 1000 and power < len(units) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return f"{nbytes:.0f} {units[power]}" if power == 0 else f"{nbytes:.1f} {units[power]}"
