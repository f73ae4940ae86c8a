"""`qtool` in processes that have everything heavy loaded already: what the tests start hundreds of, in no time.

A launcher is one process that has imported torch, transformers and qtool, and computes nothing. A command is a fork of
it, with arguments, environment, folder and standard streams of its own. The workers that a command starts in its own
interpreter are forks of the command. For tests of vLLM there is a second such process, which has vLLM too. Other
interpreters, and commands with variables that are read on import, are started as ever; so is everything where
QTOOL_TEST_COLD is set.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests import loaded_vllm

_LOADED = (
    "numpy",
    "torch",
    "transformers",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
    "gguf",
    "pyarrow.parquet",
    "safetensors.torch",
    "jinja2",
    "yaml",
    "rich.live",
    "rich.progress_bar",
    "rich.table",
    "qtool.cli.app",
    "qtool.jobs.quantize",
    "qtool.recipe.load",
)
COMMANDS = {"analyze", "convert", "eval", "generate", "inspect", "quantize", "recipes", "run", "tune"}
WORKERS = {
    "qtool.calibration.worker",
    "qtool.checkpoint.ranges",
    "qtool.conversion.checkpoint",
    "qtool.conversion.gguf",
    "qtool.engines.native.worker",
    "qtool.evaluation.worker",
    "qtool.runtimes.worker.transformers",
    "qtool.tuning.worker",
}
"""Workers that need nothing but what the launcher has."""
_VLLM_WORKER = "qtool.runtimes.worker.vllm"
_READ_ON_IMPORT = (
    "HF_",
    "HUGGINGFACE_",
    "OPENMIND_",
    "OMP_",
    "MALLOC_",
    "PYTHON",
    "PATH",
    "LD_",
    "CUDA_",
    "RAY_",
    "VLLM_",
)
_MOST = 1 << 20  # bytes of a request
_READY = "-ready"
_POPEN = subprocess.Popen
_LIVES: weakref.WeakSet[Any] = weakref.WeakSet()  # what draws in this process, in threads of their own


class Launcher:
    """The tests' side: asks the processes that everything is forked from for commands.

    Args:
        environment: variables of those processes.

    Attributes:
        vllm: what is started from now on may need vLLM.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._plain, self._with_vllm = _Parent(environment), _Parent(environment, _VLLM_WORKER)
        self.vllm = False

    def start(
        self, arguments: Sequence[object], *, env: Mapping[str, str], prepare: str = "", **options: Any
    ) -> subprocess.Popen[Any]:
        """`qtool ARGUMENTS`, with subprocess.Popen's options.

        Args:
            env: its variables.
            prepare: Python code that runs before the process begins anew as qtool: limits, privileges.
        """
        words = [*map(str, arguments)]
        if not prepare and "preexec_fn" not in options and self._suits(words, env):
            return _Command((self._with_vllm if self.vllm else self._plain).connect, words, env=env, **options)
        code = f"import os, sys\n{prepare}\nos.execv(sys.argv[1], sys.argv[1:])"
        before = [sys.executable, "-c", code] if prepare else []
        return subprocess.Popen([*before, sys.executable, "-m", "qtool", *words], env=env, **options)

    def run(
        self,
        arguments: Sequence[object],
        *,
        input: str | bytes | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """`start`, to its end, with subprocess.run's options."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        if capture_output:
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(arguments, **options) as process:
            try:
                stdout, stderr = process.communicate(input, timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def _suits(self, arguments: Sequence[str], env: Mapping[str, str]) -> bool:
        """Whether a command can be a fork: it uses what is loaded, and none of its variables is read before."""
        if "QTOOL_TEST_COLD" in os.environ or not COMMANDS.intersection(arguments[:1]):
            return False
        different = {name for name in {*env, *self._environment} if env.get(name) != self._environment.get(name)}
        return not any(name.startswith(_READ_ON_IMPORT) for name in different)

    def close(self) -> None:
        self._plain.close()
        self._with_vllm.close()


class _Parent:
    """A process that is forked, started when it is first wanted.

    Args:
        environment: its variables.
        workers: the workers that it can be besides WORKERS.
    """

    def __init__(self, environment: Mapping[str, str], *workers: str) -> None:
        self._environment, self._workers = dict(environment), workers
        self._folder = tempfile.TemporaryDirectory(prefix="qtool-launcher-")
        self._path = str(Path(self._folder.name) / "socket")
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()

    def connect(self) -> socket.socket:
        """To it."""
        with self._starting:
            if self._process is None:
                self._process = self._started()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        return connection

    def _started(self) -> subprocess.Popen[bytes]:
        with socket.socket(socket.AF_UNIX) as ready:
            ready.bind(self._path + _READY)
            ready.listen(1)
            command = [sys.executable, "-m", "tests.launcher", self._path, *self._workers]
            process = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL)
            ready.settimeout(300)
            ready.accept()[0].close()
        return process

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._folder.cleanup()


class _Command(subprocess.Popen[Any]):
    """A process that is a child of the launcher's; its exit code comes through a connection."""

    def __init__(self, connect: Callable[[], socket.socket], arguments: Sequence[str], **options: Any) -> None:
        self._connect = connect
        self._said = b""
        super().__init__(["qtool", *arguments], **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        started = _Started(*rest)
        request = {
            "arguments": args,
            "env": dict(started.env),
            "cwd": os.fspath(started.cwd or Path.cwd()),
            "new_session": started.new_session,
            "cores": sorted(os.sched_getaffinity(0)),
        }
        content = json.dumps(request).encode()
        assert len(content) < _MOST
        self._connection = self._connect()
        socket.send_fds(self._connection, [content], started.streams)
        self.pid = int(self._line(None) or -1)
        self._child_created = True
        self._close_pipe_fds(*started.pipes)  # type: ignore[attr-defined]

    def _line(self, timeout: float | None) -> bytes | None:
        """What the launcher says next; None when it says nothing within `timeout` seconds."""
        while b"\n" not in self._said:
            if not select.select([self._connection], [], [], timeout)[0]:
                return None
            data = self._connection.recv(64)
            self._said += data or b"255\n"  # the launcher has gone
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and (line := self._line(0)) is not None:
            self.returncode = int(line)
            self._connection.close()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            line = self._line(timeout)
            if line is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(line)
            self._connection.close()
        return self.returncode


class _Started:
    """What subprocess.Popen gives its `_execute_child` (CPython 3.11).

    Attributes:
        streams: descriptors for the process's standard input, output and error.
        pipes: both ends of each, -1 where there is none.
    """

    def __init__(self, *rest: Any) -> None:
        self.pass_fds, self.cwd, self.env = rest[3:6]
        self.pipes: Sequence[int] = rest[9:15]
        ends = self.pipes[0], self.pipes[3], self.pipes[5]
        self.streams = [number if end < 0 else end for number, end in enumerate(ends)]
        self.new_session: bool = rest[20]
        self.process_group: int | None = rest[21]


# ---------------------------------------------------------------- in the launcher


def _serve(path: str) -> None:
    """Fork a command for every connection, and tell it the command's exit code."""
    if _VLLM_WORKER in WORKERS:
        loaded_vllm.load()
    for name in _LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is loaded stays shared
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(8)
        with socket.socket(socket.AF_UNIX) as ready:
            ready.connect(path + _READY)
        while True:
            readable = select.select([listening.fileno(), wake, *(c.fileno() for c in running.values())], [], [])[0]
            if wake in readable:
                os.read(wake, 4096)
                _bury(running)
            for pid, connection in [*running.items()]:
                if connection.fileno() in readable and not _alive(connection):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if listening.fileno() in readable:
                connection = listening.accept()[0]
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _command(connection, [listening.fileno(), wake, woken, *(c.fileno() for c in running.values())])
                running[pid] = connection


def _bury(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as connection, contextlib.suppress(OSError):
            connection.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _alive(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return True


def _command(connection: socket.socket, others: Sequence[int]) -> NoReturn:
    """The life of one `qtool` process."""
    code = 255
    try:
        for descriptor in others:
            os.close(descriptor)
        request, descriptors, _, _ = socket.recv_fds(connection, _MOST, 3)
        asked = json.loads(request)
        if asked["new_session"]:
            os.setsid()
        os.sched_setaffinity(0, asked["cores"])  # as a child of whoever asks would have it
        _become(descriptors, asked["env"], asked["arguments"], asked["cwd"])
        with connection:  # the launcher has its own
            connection.send(f"{os.getpid()}\n".encode())
        subprocess.Popen = _Fork  # type: ignore[misc]
        _note_what_draws()
        from qtool.__main__ import main

        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)


def _become(descriptors: Sequence[int], env: Mapping[str, str], arguments: list[str], folder: str | None) -> None:
    """This process, with other standard streams, variables, arguments and folder."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        if descriptor > 2:
            os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    if folder is not None:
        os.chdir(folder)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115


def _note_what_draws() -> None:
    from rich.live import Live

    start = Live.start

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        _LIVES.add(self)
        start(self, *arguments, **options)

    Live.start = noted  # type: ignore[method-assign]


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


class _Fork(subprocess.Popen[Any]):
    """A process that is a fork of this one where it would be one of WORKERS in the same interpreter."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        arguments = [os.fspath(argument) for argument in args] if isinstance(args, list | tuple) else []
        if not arguments or arguments[0] != sys.executable or not WORKERS.intersection(arguments):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        started = _Started(*rest)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.ExitStack() as held:
            for live in _LIVES:  # its thread may hold a lock that nobody gives back in the fork
                held.enter_context(live._lock)
            self.pid = os.fork()
            if not self.pid:
                _worker(started, arguments)
        self._child_created = True
        self._close_pipe_fds(*started.pipes)  # type: ignore[attr-defined]


def _worker(started: _Started, arguments: Sequence[str]) -> NoReturn:
    """The life of one worker."""
    try:
        if started.process_group is not None and started.process_group >= 0:
            os.setpgid(0, started.process_group)
        kept = [os.dup(stream) for stream in started.streams]
        low = 3
        for descriptor in sorted({*started.pass_fds, *kept}):
            os.closerange(low, descriptor)
            low = descriptor + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        first = next(i for i, argument in enumerate(arguments) if argument in WORKERS)
        env = os.environ.copy() if started.env is None else started.env
        _become(kept, env, [*arguments[first - 1 :]], started.cwd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        subprocess.Popen = _POPEN  # type: ignore[misc]
        from qtool.workers import child

        child.serve(arguments[first:])
    except BaseException:
        traceback.print_exc()
    os._exit(255)


if __name__ == "__main__":
    WORKERS.update(sys.argv[2:])
    _serve(sys.argv[1])
