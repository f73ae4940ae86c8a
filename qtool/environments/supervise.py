"""Runs a command of which nothing survives: not the command, nor what it starts, once qtool or the call is gone.

This file is also the program that stands between: it leads the command's process group, and ends the whole group
when its parent dies. Standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TICK_SECONDS = 0.3


def run(
    command: Sequence[str],
    *,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
    inherit: Sequence[int] = (),
) -> int:
    """Run `command` without input and return its exit code, negative for a signal.

    Args:
        on_line: called here with each line of its output and errors, without the line's end.
        on_tick: called here every TICK_SECONDS or so.
        env: variables to set on top of this process's own.
        inherit: descriptors that all its processes get.

    Raises:
        OSError: it can't be started. Whatever the callbacks raise, and KeyboardInterrupt, once the group has ended.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", __file__, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
        pass_fds=inherit,
        process_group=0,
    )
    assert child.stdout is not None
    try:
        rest = b""
        while True:
            if select.select([child.stdout], [], [], TICK_SECONDS)[0]:
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    return child.wait()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    on_line(line.decode("utf-8", "replace").rstrip())
            on_tick()
    finally:
        child.stdout.close()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)


def _watch(parent: int) -> None:
    """End the process group once `parent` is no longer the parent."""
    while os.getppid() == parent:
        time.sleep(TICK_SECONDS)
    _end_group()


def _serve() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: _end_group())
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    try:
        code = subprocess.call(command, close_fds=False)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    if code < 0:
        print(f"{Path(command[0]).name} was killed by signal {-code}", flush=True)
    return code if code >= 0 else 1


if __name__ == "__main__":
    sys.exit(_serve())
