"""What memory this process has used."""

from __future__ import annotations

import resource
import sys


def peak() -> int:
    """Peak resident set of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
