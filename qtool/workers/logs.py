"""The logs: what a worker's engine, or an installer, has to say."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from qtool import locks

LOGS_KEPT = 20


def new_log(name: str) -> Path:
    """A new private log file; older ones beyond LOGS_KEPT are removed, but not those that somebody has locked."""
    import tempfile

    from platformdirs import user_log_path

    prefix = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-"
    folder = user_log_path("qtool")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=folder)
    except OSError:  # no home to write to
        descriptor, path = tempfile.mkstemp(prefix=f"qtool-{prefix}", suffix=".log")
    os.close(descriptor)
    for old in sorted(folder.glob("*.log"))[:-LOGS_KEPT]:
        with contextlib.suppress(OSError), old.open("ab") as log:
            if locks.lock(log):
                old.unlink()
    return Path(path)
