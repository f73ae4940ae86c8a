"""More bad inputs by chance: `python -m tests.fuzz --minutes N [--only KIND] [--seed S]`.

The time is shared among the kinds. It prints how many inputs were tried, and each way to fail once, with its seed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=5.0, help="in all")
    parser.add_argument("--only", choices=KINDS, action="append", default=[], help="a kind; can be repeated")
    parser.add_argument("--seed", type=int, help="where to begin, as a failure names it")
    given = parser.parse_args()
    kinds = given.only or list(KINDS)
    os.environ["QTOOL_FUZZ_SECONDS"] = str(given.minutes * 60 / len(kinds))
    os.environ["QTOOL_FUZZ_ONLY"] = " ".join(kinds)
    if given.seed is not None:
        os.environ["QTOOL_FUZZ_SEED"] = str(given.seed)
    file = Path(__file__).with_name("test_fuzz.py")
    return pytest.main([str(file), "-q", "-p", "no:xdist", "-o", "timeout=0", "--tb=short"])


if __name__ == "__main__":
    sys.exit(main())
