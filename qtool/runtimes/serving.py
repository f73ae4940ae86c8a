"""A server process from its start to its end: when it answers, what it says, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qtool.errors import InputError, QtoolError
from qtool.workers import processes
from qtool.workers.logs import new_log

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listened on by all addresses, asked at one
_ASK_SECONDS = 0.5
_KEPT = 50 << 20  # bytes of the log of a server that runs for weeks
_STAGES = (  # what vLLM 0.32 logs as it begins something
    (re.compile(r"Starting to load model|Loading (weights|safetensors)"), "loading the model"),
    (re.compile(r"Dynamo bytecode|Compiling a graph|Start compiling"), "compiling the model"),
    (re.compile(r"[Cc]apturing .*graph|Warming up|warming up"), "warming up"),
)
_REASON = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)")


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        secure: by HTTPS.
    """

    host: str
    port: int
    secure: bool = False

    @property
    def url(self) -> str:
        """As whoever is on this machine reaches it."""
        host = _EVERYWHERE.get(self.host, self.host)
        return f"http{'s' if self.secure else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def check(self) -> None:
        """Raises InputError when something listens there already, or nothing can."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise InputError(f"is not a valid address: {error.strerror}", where=f"--host {self.host}") from None
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                what = f"can't be used to listen: {error.strerror}"
                raise InputError(what, where=f"{self.host}:{self.port}", hint="Choose another --port.") from None

    def answers(self) -> bool:
        """Whether the server there says that it is well."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only asked whether it is up
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        try:
            with urllib.request.build_opener(*handlers).open(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False


def run(
    command: Sequence[str],
    env: dict[str, str],
    address: Address,
    *,
    on_stage: Callable[[str], None],
    on_line: Callable[[str], None],
    on_ready: Callable[[], None],
) -> None:
    """Run a server until it ends, or this process is told to.

    Args:
        command: the server.
        env: variables to set for it.
        on_stage: told what it does as it starts.
        on_line: told each line that it logs.
        on_ready: called once, as soon as it answers.

    Raises:
        QtoolError: it could not be started, or has ended by itself; with what it said, and the log's path.
        KeyboardInterrupt: and the server has ended, with all that it started.
    """
    log_path = new_log("serve")
    leash = processes.isolated_python(sys.executable, str(processes.PROGRAM), "leash", str(os.getpid()))
    child = processes.start([*leash, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    assert child.stdout is not None
    last: deque[str] = deque(maxlen=400)
    ready, asked = False, time.monotonic()
    on_stage("starting vLLM")
    try:
        with log_path.open("wb") as log:
            for raw in processes.lines(child, child.stdout):
                if raw is not None:
                    _keep(log, raw)
                    line = raw.decode("utf-8", "replace").rstrip()
                    last.append(line)
                    on_line(line)
                    if not ready and (stage := _stage(line)):
                        on_stage(stage)
                if not ready and time.monotonic() - asked >= _ASK_SECONDS:
                    if ready := address.answers():
                        on_ready()
                    asked = time.monotonic()
        code = processes.exit_code(child)
    finally:
        child.stdout.close()
        processes.end(child)
    if code != 0 or not ready:
        raise _ended(code, last, log_path, ready=ready)


def _keep(log: IO[bytes], line: bytes) -> None:
    if log.tell() > _KEPT:
        log.seek(0)
        log.truncate()
    with contextlib.suppress(OSError):  # a full disk doesn't end a server
        log.write(line + b"\n")
        log.flush()


def _stage(line: str) -> str | None:
    return next((stage for pattern, stage in _STAGES if pattern.search(line)), None)


def _ended(code: int | None, lines: Sequence[str], log: Path, *, ready: bool) -> QtoolError:
    """Why, as far as the server says: the last error of its log, but for those that only repeat it."""
    reasons = [found[1] for line in lines if (found := _REASON.search(line)) and "Engine core init" not in found[1]]
    when = "has ended" if ready else "did not start"
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    said = f": {reasons[-1]}" if reasons else ""
    return QtoolError(f"the server {when} ({how}){said}", hint=f"Its log has the details: {log}")
