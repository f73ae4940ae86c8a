"""Where a process of qtool spends its time: Python imports this by itself from a folder on PYTHONPATH.

Every 10 ms the innermost frame of qtool's own code is noted, for each thread that has one. What torch does is counted
to the line that calls it; work on a device to the line that waits for it (CUDA_LAUNCH_BLOCKING=1 makes each line wait
for its own). When each decoder layer begins is noted too; with QTOOL_CHECK_KERNELS=1 also what the device computed
during the second of them. All goes into $QTOOL_CHECK_SAMPLES/PID.json every few seconds, and as the process ends.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_INTERVAL, _WRITE_INTERVAL = 0.01, 10.0
_PACKAGE = str(Path(__file__).resolve().parents[3] / "qtool") + os.sep
_LAYERS = "engines/native/schedule.py", "Schedule.run"  # whose local variable `index` is the layer's number


class Sampler:
    def __init__(self, folder: Path) -> None:
        self._file = folder / f"{os.getpid()}.json"
        self._places: dict[tuple[str, str, int, str], int] = {}
        self._samples: list[tuple[float, float, int]] = []  # (moment, seconds since the one before, place)
        self._begins: dict[int, float] = {}  # of layers
        self._kernels = Kernels() if "QTOOL_CHECK_KERNELS" in os.environ else None
        self._lock = threading.Lock()

    def watch(self) -> None:
        before, written = time.time(), 0.0
        while True:
            time.sleep(_INTERVAL)
            now = time.time()
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident == threading.get_ident():
                    continue
                if (place := _place(frame)) is not None:
                    number = self._places.setdefault((*place, names.get(ident, "?")), len(self._places))
                    self._samples.append((now, now - before, number))
                if (layer := _layer(frame)) is not None and layer not in self._begins:
                    self._begins[layer] = now
                    if self._kernels:
                        self._kernels.begun(len(self._begins))
            if now - written > _WRITE_INTERVAL:
                self.write()
                written = now
            before = now

    def write(self) -> None:
        samples = [*self._samples]  # before the places: the thread that watches may be adding both
        content = {
            "places": [*self._places],
            "samples": samples,
            "layer_begins": [*self._begins.values()],
            "kernels": self._kernels.found if self._kernels else [],
            "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_bytes": _device_bytes(),
        }
        with self._lock:
            partial = self._file.with_suffix(".part")
            partial.write_text(json.dumps(content))
            partial.rename(self._file)


def _place(frame: FrameType | None) -> tuple[str, str, int] | None:
    """(file inside qtool, function, line) of the innermost frame there."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return file.removeprefix(_PACKAGE), frame.f_code.co_qualname, frame.f_lineno or 0  # some code has no line
        frame = frame.f_back
    return None


def _layer(frame: FrameType | None) -> int | None:
    """The number of the decoder layer that a thread is at."""
    while frame is not None:
        if frame.f_code.co_qualname == _LAYERS[1] and frame.f_code.co_filename == _PACKAGE + _LAYERS[0]:
            return frame.f_locals.get("index")
        frame = frame.f_back
    return None


class Kernels:
    """What the device computes while the second layer that begins is at work.

    Attributes:
        found: (kernel or copy, seconds, how many), the longest first.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, float, int]] = []
        self._profile: Any = None

    def begun(self, layers: int) -> None:
        """A layer begins, the first is 1."""
        from torch.profiler import ProfilerActivity, profile

        if layers == 2:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        elif layers == 3:
            self._profile.stop()
            all_kinds = [(each.key, each.device_time_total / 1e6, each.count) for each in self._profile.key_averages()]
            self.found = sorted(all_kinds, key=lambda each: -each[1])[:60]


def _device_bytes() -> int:
    """The most that torch's tensors took on the device."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda.max_memory_allocated() if cuda is not None and cuda.is_initialized() else 0


def _start(folder: Path) -> None:
    sampler = Sampler(folder)
    threading.Thread(target=sampler.watch, name="sampler", daemon=True).start()
    end = os._exit

    def write_and_end(status: int) -> NoReturn:  # a worker ends this way
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once it has given its result, it is asked to end
        sampler.write()
        end(status)

    os._exit = write_and_end


if "QTOOL_CHECK_SAMPLES" in os.environ and "-m" not in sys.orig_argv:  # the command itself only waits
    _start(Path(os.environ["QTOOL_CHECK_SAMPLES"]))
