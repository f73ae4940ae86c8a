"""Stands between qtool and a command: leads the process group, and ends all of it when qtool dies or says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qtool.workers.processes import end_with_parent


def serve(arguments: Sequence[str]) -> None:
    """Run a command and exit as it does. Arguments: the parent's process id, the command."""
    parent, *command = arguments
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    end_with_parent(int(parent), signal.SIGTERM)
    try:
        code = subprocess.call(command, close_fds=False)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        code = 127
    if code < 0:
        print(f"{Path(command[0]).name} was killed by signal {-code}", flush=True)
    sys.exit(code if code >= 0 else 1)
