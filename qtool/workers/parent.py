"""The parent's side: starts a worker, feeds it, hears it, and says what became of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from qtool import locks, sizes
from qtool.errors import ForeignError, InputError, QtoolError, WorkerDied
from qtool.workers import processes
from qtool.workers.logs import new_log
from qtool.workers.protocol import Event, as_exception, decode, encode

LESS_AT_ONCE = {"qtool.runtimes.worker.vllm": " (--set max_num_seqs=8, or fewer)"}  # how a user asks a worker for it
BEAT_SECONDS = 10.0  # how often a worker is heard, at least
SILENCE_SECONDS = 60.0  # after which the user is told; again when it has doubled, and so on


def run(
    module: str,
    job: dict[str, Any],
    *,
    python: str | None = None,
    on_event: Callable[[Event], None],
    inputs: Iterable[dict[str, Any]] | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
    doing: str = "starting",
) -> dict[str, Any]:
    """Run `module.main(job, report)` in a process of its own and return its result.

    Args:
        module: dotted name of a module with `main(job: dict, report: Report) -> dict`.
        job: anything JSON can say.
        python: the interpreter; None means the current one.
        on_event: called here with a status event before the worker starts, which takes seconds; then with each
            progress, warning and item event, in order; and with a warning when nothing at all has been heard of the
            worker for long.
        inputs: what `report.inputs` gives the worker, one by one. A thread here asks for the next as soon as the worker
            has room for it, and may still be waiting for one when this returns.
        env: variables to set in the worker, on top of this process's own.
        doing: what the status event says.
        timeout: after so many seconds without a result the worker is stopped; None waits for ever.

    Raises:
        QtoolError, InputError, WorkerDied: as raised in the worker; QtoolError too for any other exception there,
            for a worker that was killed, for one that ended without a result (both a `WorkerDied`), for one that says
            what is no event, and for one that took too long.
        KeyboardInterrupt: the worker has been stopped. So it has for whatever `on_event` raises.
        Exception: whatever `inputs` raises, once the worker is done with those before.
    """
    on_event({"event": "status", "what": doing})
    log_path = new_log(module.rpartition(".")[2])
    read_end, write_end = os.pipe()
    with (
        os.fdopen(read_end, "rb", buffering=0) as events,
        _Stdin(job, inputs) as stdin,
        log_path.open("ab") as log,
        _termination_as_exit(),
    ):
        locks.lock(log)  # the worker's copy keeps it locked until that has ended: nobody removes it meanwhile
        arguments = [module, str(write_end), str(os.getpid()), str(BEAT_SECONDS)]
        command, safe = processes.python(
            python or sys.executable, "-X", "faulthandler", str(processes.PROGRAM), "child", *arguments
        )
        try:
            child = processes.start(
                command,
                stdin=stdin.end,
                stdout=log,
                env={"PYTHONUNBUFFERED": "1", **safe, **(env or {})},
                inherit=(write_end,),
            )
        except OSError as error:
            raise QtoolError(f"cannot start the worker: {error.strerror}", where=command[0]) from None
        finally:
            os.close(write_end)
        try:
            stdin.start()
            for event in _events(child, events, log_path, timeout):
                if event["event"] == "result":
                    stdin.check()
                    return dict(event["data"])
                if event["event"] == "error":
                    raise _named(as_exception(event), log_path)
                on_event(event)
            raise _post_mortem(child, module, log_path)
        finally:
            processes.end(child)


class _Stdin:
    """A worker's standard input: the job, then the inputs, written by a thread. A job alone needs no thread.

    Attributes:
        end: what the worker reads from.
    """

    def __init__(self, job: dict[str, Any], inputs: Iterable[dict[str, Any]] | None) -> None:
        self._lines = inputs
        self._error: BaseException | None = None
        if self._lines is None:
            import tempfile

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
        file.write(encode(line))
        file.flush()

    def __enter__(self) -> _Stdin:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()


def _events(child: processes.Child, pipe: IO[bytes], log: Path, timeout: float | None) -> Iterator[Event]:
    """What the worker says, and a warning when it has been silent for long."""
    end = float("inf") if timeout is None else time.monotonic() + timeout
    heard, patience = time.monotonic(), SILENCE_SECONDS
    for line in processes.lines(child, pipe):
        now = time.monotonic()
        if now > end:
            raise QtoolError(f"no answer within {timeout:g} seconds")
        if line is None:
            if now - heard > patience:
                patience *= 2
                yield {"event": "warning", "message": _silence(child.pid, now - heard, log)}
            continue
        heard, patience = now, SILENCE_SECONDS
        try:
            event = decode(line)
        except ValueError:
            said = ascii(line[:100].decode(errors="replace")) + (f", {sizes.show(len(line))}" if line[100:] else "")
            hint = f"The worker's log may say why: {log}"
            raise QtoolError(f"the worker sent something that is not an event: {said}", hint=hint) from None
        if event["event"] != "alive":
            yield event


def _silence(pid: int, seconds: float, log: Path) -> str:
    message = f"no message from the worker (process {pid}) for {seconds:.0f} s"
    if processes.is_stopped(pid):
        return f"{message}: it has been stopped; kill -CONT {pid} lets it continue"
    return f"{message}; its log: {log}"


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


def _named(error: Exception, log: Path) -> Exception:
    """The worker's error; unless it is for the user to mend, with the log's name."""
    if isinstance(error, ForeignError) or (isinstance(error, QtoolError) and not isinstance(error, InputError)):
        error.hint = f"{error.hint}  (log: {log})" if error.hint else f"The worker's log has the details: {log}"
    return error


def _post_mortem(child: processes.Child, module: str, log: Path) -> Exception:
    code = processes.exit_code(child)
    hint = f"The worker's log has the details: {log}"
    if code is None or code >= 0:
        return WorkerDied(f"the worker ended without a result (exit code {code})", hint=hint)
    if code == -signal.SIGKILL:
        what = "the worker was killed by signal 9, most likely because memory ran out"
        less = LESS_AT_ONCE.get(module, "")
        return WorkerDied(what, hint=f"Free some memory or ask for less at once{less}. {hint}")
    name = next((f" ({known.name})" for known in signal.Signals if known == -code), "")
    return WorkerDied(f"the worker was killed by signal {-code}{name}", hint=hint)
