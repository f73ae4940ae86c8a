"""What the benchmarks share: a command's time and memory, models cut to size, and plain tables."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEFAULT_MODEL = REPOSITORY / "build" / "SmolLM2-135M-Instruct"
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """One run of a command.

    Attributes:
        seconds: wall time of the whole process.
        processor: processor seconds of the whole process tree.
        parent: peak resident set of the process itself, bytes.
        worker: the same of its largest descendant; 0 when it has none.
        together: the largest sum over the whole process tree at one moment (shared pages count in each).
        said: the end of what it wrote to stdout and stderr.
    """

    seconds: float
    processor: float
    parent: int
    worker: int
    together: int
    said: str


def measure(command: Sequence[str | Path], **environment: str) -> Measured:
    """Run a command to its end and watch its process tree in /proc.

    Peaks are the kernel's own (VmHWM), read often enough to miss only the last moment; `together` is sampled.

    Raises:
        SystemExit: the command failed; shows what it said.
    """
    peaks: dict[int, int] = {}
    together = 0
    used = _processor_seconds()
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*map(str, command)], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                now = 0
                for pid in tree(process.pid):
                    peak, resident = _memory(pid)
                    peaks[pid] = max(peaks.get(pid, 0), peak)
                    now += resident
                together = max(together, now)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # only if this one is interrupted
            process.wait()
        seconds = time.perf_counter() - begin
        output.seek(0)
        said = output.read()[-3000:]
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command))}\nfailed with exit code {process.returncode}:\n{said}")
    parent = peaks.pop(process.pid, 0)
    return Measured(seconds, _processor_seconds() - used, parent, max(peaks.values(), default=0), together, said)


def _processor_seconds() -> float:
    """Of all processes that this one has waited for, and that these have waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        found.append(current := todo.pop())
        for children in Path(f"/proc/{current}/task").glob("*/children"):
            try:
                todo += map(int, children.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(peak, current) resident set in bytes; zeros for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return values.get("VmHWM", 0), values.get("VmRSS", 0)


def builtin_text(folder: Path, tokens: int) -> Path:
    """CPython's own help texts, as a file that is long enough for about so many tokens."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    file = folder / "text.txt"
    file.write_text(text * (1 + tokens * 6 // len(text)), encoding="utf-8")
    return file


def cut(model: Path, layers: int, target: Path) -> Path:
    """A copy of a model with its first layers only."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                number = next((part for part in name.split(".") if part.isdigit()), None)
                if number is None or int(number) < layers:
                    tensors[name] = opened.get_tensor(name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    changes = {"num_hidden_layers": layers}
    if "layer_types" in config:
        changes["layer_types"] = config["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the range when there is more than one value."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def model_or_exit(model: Path) -> Path:
    if not (model / "config.json").exists():
        sys.exit(f"no model in {model}: run `make demo` first, or pass --model")
    return model
