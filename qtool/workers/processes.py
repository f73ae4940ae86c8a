"""Child processes of which nothing survives: not the child, nor what it starts, once the call or qtool itself is gone.

A child leads a process group of its own. Its parent ends the group; and should the parent die without a chance to, the
child notices by itself (`end_with_parent`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from qtool.workers.protocol import Lines

Child = subprocess.Popen[bytes]
PROGRAM = Path(__file__).with_name("program.py")
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1
_CHUNK = 1 << 16


def python(interpreter: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """How to start a Python interpreter in which nothing in the current folder can stand in for a real module.

    Whatever qtool starts it starts so (or isolated, `-I`): that folder may be one that was downloaded, with a torch.py.

    Returns:
        The command, and the variables to set for it, which its own children inherit: engines start `python -m …` too.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    path = os.environ.get("PYTHONPATH", "")
    whole = os.pathsep.join(filter(None, path.split(os.pathsep)))
    if whole != path:  # an empty part means the current folder, and PYTHONPATH=$PYTHONPATH:… leaves one
        variables["PYTHONPATH"] = whole
    return [interpreter, "-P", *arguments], variables


def isolated_python(interpreter: str, *arguments: str) -> list[str]:
    """As `python`, for what needs nothing but the interpreter and its own packages, and heeds no variables."""
    return [interpreter, "-I", *arguments]


def start(
    command: Sequence[str],
    *,
    stdin: IO[bytes] | int,
    stdout: IO[bytes] | int,
    env: Mapping[str, str],
    inherit: Sequence[int] = (),
) -> Child:
    """Start a child, its errors where its output goes; `end` it whatever happens.

    Args:
        env: variables to set on top of this process's own.
        inherit: descriptors that it gets.

    Raises:
        OSError: it can't be started.
    """
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        env={**os.environ, **env},
        pass_fds=inherit,
        process_group=0,  # so that Ctrl-C comes here only, and the child's helpers can be ended with it
    )


def exit_code(child: Child) -> int | None:
    """How a child ended, negative for a signal; None if it has not within GRACE_SECONDS."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    return child.returncode


def end(child: Child) -> None:
    """Ask a child to end, so that it can clean up; then end it and all that is left of its process group."""
    try:
        child.terminate()
        exit_code(child)
    finally:  # a second Ctrl-C waits no longer
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def lines(child: Child, stream: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of an unbuffered pipe as they come, and None in between, every POLL_SECONDS or so.

    They end when the pipe is closed or the child is gone, for a helper that it left may keep the pipe open.
    """
    cut = Lines()
    while True:
        gone = child.poll() is not None
        if select.select([stream], [], [], 0 if gone else POLL_SECONDS)[0]:
            data = os.read(stream.fileno(), _CHUNK)
            if not data:
                return
            yield from cut.feed(data) or (None,)
        elif gone:
            return
        else:
            yield None


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped (SIGSTOP, a debugger); False where that can't be told."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have this process get a signal when its parent dies, however that happens."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)
    else:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(POLL_SECONDS)
            os.killpg(0, number)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)
