"""Becomes a command that knows nothing of qtool, and that is asked to end when qtool dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from qtool.workers.processes import end_with_parent


def serve(arguments: Sequence[str]) -> None:
    """Arguments: the parent's process id, the command. On Linux the wish outlives execve; elsewhere it ends there."""
    parent, *command = arguments
    if sys.platform == "linux":
        end_with_parent(int(parent), signal.SIGTERM)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        sys.exit(127)
