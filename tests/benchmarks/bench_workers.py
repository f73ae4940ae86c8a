"""`qtool quantize` in one process, with --workers and on Ray: time, memory, and whether the files are the same.

Rounds take turns. Runs of the same number of threads must give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import (
    DEFAULT_MODEL,
    REPOSITORY,
    Measured,
    builtin_text,
    measure,
    model_or_exit,
    spread,
    table,
)

RUNS = {
    "1 process, 2 threads": ("--threads", "2"),
    "1 process, 1 thread": ("--threads", "1"),
    "2 workers, 1 thread each": ("--threads", "1", "--workers", "2"),
    "Ray on this machine, 1 thread each": ("--threads", "1", "--ray", "local"),
}


def digest(folder: Path) -> str:
    """Of the tensors' files, which hold no times."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = model_or_exit(options.model)
    measured: dict[str, list[Measured]] = {name: [] for name in RUNS}
    digests: dict[str, set[str]] = {name: set() for name in RUNS}
    with tempfile.TemporaryDirectory() as name:
        text = builtin_text(Path(name), options.samples * options.seq_len)
        for number in range(options.rounds):
            for run, arguments in RUNS.items():
                output = Path(name) / f"{number}-{'-'.join(arguments)}"
                command: list[str | Path] = [sys.executable, "-m", "qtool", "quantize", model, "-o", output, "--quiet"]
                command += ["--calibration", text, "--samples", str(options.samples)]
                command += ["--seq-len", str(options.seq_len), *arguments]
                measured[run].append(measure(command, PYTHONPATH=str(REPOSITORY)))
                digests[run].add(digest(output))
    rows = [
        [
            run,
            spread([one.seconds for one in runs]),
            spread([one.together / 1e6 for one in runs], 0),
            ", ".join(sorted(digests[run])),
        ]
        for run, runs in measured.items()
    ]
    print(f"{model.name}, {options.samples} x {options.seq_len} tokens, {options.rounds} rounds\n")
    print(table(["", "seconds", "peak MB: tree", "SHA-256 of the weights"], rows))


if __name__ == "__main__":
    main()
