"""A helper process for a stranger's program, such as a pattern or a template: its time and its memory end.

It is started when it is needed, kept for further requests, and started again after it had to end.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from qtool.workers import processes

# What the helper's own code finds in place: `limit()`, and `serve(answer)`, which answers lines of JSON until there are
# no more. Whatever libraries print goes nowhere: standard output is for answers.
_PROLOGUE = """
import json, os, resource, sys, time, warnings
warnings.simplefilter("ignore")
_out = os.fdopen(os.dup(1), "wb")
_nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 1), os.dup2(_nowhere, 2)
_seconds, _memory = float(sys.argv[1]), int(sys.argv[2])

def serve(answer):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _memory, used + _memory))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin.buffer:
        began = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(began + _seconds + 1), hard))
        try:
            found = {"value": answer(json.loads(line))}
        except MemoryError:
            found = {"ended": "memory"}
        except Exception as error:
            found = {"error": str(error) or type(error).__name__}
        try:
            line = json.dumps(found | {"seconds": time.process_time() - began}).encode()
        except MemoryError:
            line = b'{"ended": "memory"}'
        _out.write(line + b"\\n")
        _out.flush()
"""


class Ended(Exception):
    """A request took more time or memory than it may."""


class Refused(Exception):
    """The program raised something; the message is its own."""


class Helper:
    """Answers requests one at a time, from any thread.

    Args:
        program: Python code that defines what a request comes to, and calls `serve` with that function.
        seconds: of processor time for a request.
        memory: bytes beside what the helper has once it is ready.
        interpreter: a command that runs Python, and variables to set for it.
    """

    def __init__(
        self, program: str, seconds: float, memory: int, interpreter: Callable[..., tuple[list[str], dict[str, str]]]
    ) -> None:
        self._code, self._interpreter = _PROLOGUE + program, interpreter
        self._limits = (str(seconds), str(memory))
        self._lock = threading.Lock()
        self._child: processes.Child | None = None
        self._owner = 0
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Any) -> tuple[Any, float]:
        """The answer, and the seconds of processor time that it took. Raises Ended, Refused."""
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                answer = json.loads(child.stdout.readline())
            except (OSError, ValueError):
                self._end(child)
                raise Ended from None
            except BaseException:  # Ctrl-C: its answer would be taken for the next one's
                self._end(child)
                raise
            if "ended" in answer:
                self._end(child)
                raise Ended
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["value"], float(answer["seconds"])

    def _running(self) -> processes.Child:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            command, env = self._interpreter("-c", self._code, *self._limits)
            self._child = processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            self._owner = os.getpid()
        return self._child

    def _end(self, child: processes.Child) -> None:
        self._child = None
        child.kill()
        processes.end(child)

    def _forget(self) -> None:
        """A fork of this process has no helper, and its lock may have been taken by a thread that it lacks."""
        self._lock, self._child = threading.Lock(), None
