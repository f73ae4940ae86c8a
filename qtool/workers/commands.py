"""Runs a command that knows nothing of qtool, such as pip, and of which nothing survives all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from qtool.workers import processes


def run(
    command: Sequence[str],
    *,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
    inherit: Sequence[int] = (),
) -> int:
    """Run `command` without input and return its exit code; 127 if there is no such program, 1 if a signal ended it.

    Args:
        on_line: called here with each line of its output and errors, without the line's end.
        on_tick: called here now and then.
        env: variables to set on top of this process's own.
        inherit: descriptors that all its processes get.

    Raises:
        Whatever the callbacks raise, and KeyboardInterrupt, once all of its processes have ended.
    """
    guard = processes.isolated_python(sys.executable, str(processes.PROGRAM), "guard", str(os.getpid()))
    child = processes.start(
        [*guard, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env or {}, inherit=inherit
    )
    assert child.stdout is not None
    try:
        for line in processes.lines(child, child.stdout):
            if line is not None:
                on_line(line.decode("utf-8", "replace").rstrip())
            on_tick()
        return child.wait()
    finally:
        child.stdout.close()
        processes.end(child)
