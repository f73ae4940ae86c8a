"""`qtool quantize` in a process of its own, watched: seconds, memory, the device's load, and where the time goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parents[2]
_IDLE = {"Report.beat.<locals>.go_on"}  # sleeps most of the time
_QUERY = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--id=0", "-lms", "100"]


@dataclass
class Place:
    """Time in one function of qtool, in what it calls outside of qtool included.

    Attributes:
        lines: seconds by line number.
    """

    file: str
    function: str
    thread: str
    lines: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        return sum(self.lines.values())


@dataclass(frozen=True)
class Run:
    """One run of `qtool quantize`.

    Attributes:
        seconds: all of it.
        layer_seconds: from the first layer's begin to the end of the process.
        paces: seconds from one layer's begin to the next one's, of all but the first and the last.
        host_bytes: peak resident set of its largest process.
        device_bytes: peak of torch's tensors on the device.
        device_used: peak of the device's memory in use, over what was before, as nvidia-smi says; None without one.
        load: share of the time that the device computed, 0 to 1, as nvidia-smi says, from the second layer's begin to
            the last one's, or in all layers where these are few; None without one.
        kernels: (kernel or copy, seconds, how many) of the second layer, the longest first, if they were asked for.
        start: where the time before the layers went, the longest first.
        places: where the time went in which `load` was seen.
        error: the end of what it said, if it failed or was stopped; "" otherwise.
    """

    seconds: float
    layer_seconds: float
    paces: list[float]
    host_bytes: int
    device_bytes: int
    device_used: int | None
    load: float | None
    kernels: list[tuple[str, float, int]]
    start: list[Place]
    places: list[Place]
    error: str


def quantize(
    model: Path, output: Path, options: Sequence[str | Path], limit: float | None = None, *, kernels: bool = False
) -> Run:
    """Run `qtool quantize MODEL --output OUTPUT OPTIONS`.

    Args:
        output: its neighbours OUTPUT.samples and OUTPUT.state are for this function.
        limit: seconds after which it is stopped.
        kernels: whether to say what the device computes.
    """
    samples, state = output.with_suffix(".samples"), output.with_suffix(".state")
    samples.mkdir()
    paths = [str(Path(__file__).parent / "sampler"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "QTOOL_CHECK_SAMPLES": str(samples),
        "XDG_STATE_HOME": str(state),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    } | ({"QTOOL_CHECK_KERNELS": "1"} if kernels else {})
    command = [sys.executable, "-m", "qtool", "quantize", model, "--output", output, *options]
    said: list[tuple[float, str]] = []
    with _device(watched="cuda" in options) as seen:
        begin = time.time()
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        reader = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
        reader.start()
        try:
            process.wait(limit)
            stopped = ""
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its worker
            process.wait()
            stopped = f"stopped after {limit:.0f} s"
        finally:
            process.kill()
        end = time.time()
        reader.join()
    error = stopped or ("\n".join(line for _, line in said[-8:]) if process.returncode else "")
    if error and not stopped:
        logs = sorted(state.rglob("*.log"))
        error += "".join(f"\n{file.name}:\n{file.read_text()[-2000:]}" for file in logs)
    first = next((moment for moment, line in said if line.startswith("quantize (")), begin)
    found = [json.loads(file.read_text()) for file in samples.glob("*.json")]
    shutil.rmtree(samples)
    shutil.rmtree(state, ignore_errors=True)
    begins = sorted(moment for one in found for moment in one["layer_begins"])
    steady = (begins[1], begins[-1]) if len(begins) > 2 else (first, end)
    loads = [load for moment, load, _ in seen if steady[0] <= moment <= steady[1]]
    memory = [used for moment, _, used in seen if moment >= begin]
    return Run(
        seconds=end - begin,
        layer_seconds=end - first,
        paces=[after - before for before, after in pairwise(begins[1:])],
        host_bytes=max((one["host_bytes"] for one in found), default=0),
        device_bytes=max((one["device_bytes"] for one in found), default=0),
        device_used=max(memory) - min(memory) if memory else None,
        load=sum(loads) / len(loads) if loads else None,
        kernels=[tuple(each) for one in found for each in one["kernels"]],
        start=_places(found, begin, first),
        places=_places(found, *steady),
        error=error,
    )


def _listen(pipe: IO[str], said: list[tuple[float, str]]) -> None:
    said += ((time.time(), line.rstrip()) for line in pipe)


def _places(found: Sequence[dict[str, Any]], begin: float, end: float) -> list[Place]:
    places: dict[tuple[str, str, str], Place] = {}
    for one in found:
        for moment, seconds, number in one["samples"]:
            if begin <= float(moment) < end:
                file, function, line, thread = one["places"][int(number)]
                if function in _IDLE:
                    continue
                key = (str(file), str(function), str(thread))
                places.setdefault(key, Place(*key)).lines[int(line)] += float(seconds)
    return sorted(places.values(), key=lambda place: -place.seconds)


@contextmanager
def _device(*, watched: bool) -> Iterator[list[tuple[float, float, int]]]:
    """Watch the device; the list gets (moment, load 0 to 1, bytes in use) ten times a second."""
    seen: list[tuple[float, float, int]] = []
    program = shutil.which("nvidia-smi") if watched else None
    if program is None:
        yield seen
        return
    with subprocess.Popen([program, *_QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        thread = threading.Thread(target=_note, args=(process.stdout, seen), daemon=True)
        thread.start()
        time.sleep(0.3)  # what is in use before
        try:
            yield seen
        finally:
            process.terminate()
            thread.join()


def _note(pipe: IO[str], seen: list[tuple[float, float, int]]) -> None:
    for line in pipe:
        load, _, used = line.partition(",")
        if load.strip().isdigit() and used.strip().isdigit():
            seen.append((time.time(), int(load) / 100, int(used) << 20))
