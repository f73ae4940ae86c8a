"""`qtool quantize` against llm-compressor's SmoothQuant W8A8: same model, same text, taking turns.

QTOOL_BENCH_LLMCOMPRESSOR_PYTHON names an interpreter that has llmcompressor==0.14.0.1; without it qtool runs alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
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

VARIABLE = "QTOOL_BENCH_LLMCOMPRESSOR_PYTHON"
PEER = Path(__file__).with_name("_llm_compressor.py")


def peer_python() -> str | None:
    """The interpreter with llm-compressor, or None after saying why there is none."""
    python = os.environ.get(VARIABLE)
    if not python:
        print(f"llm-compressor left out: {VARIABLE} names no interpreter", file=sys.stderr)
        return None
    try:
        found = subprocess.run(
            [python, "-c", "from importlib.metadata import version; print(version('llmcompressor'))"],
            capture_output=True,
            text=True,
        )
    except OSError as error:
        print(f"llm-compressor left out: {python}: {error.strerror}", file=sys.stderr)
        return None
    if found.returncode:
        print(f"llm-compressor left out: {python} does not have it", file=sys.stderr)
        return None
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, help="a .txt file; default: CPython's own help texts")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = model_or_exit(options.model)
    python = peer_python()
    runs: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or builtin_text(Path(folder), options.samples * options.seq_len)
        size = (str(options.samples), str(options.seq_len))
        for number in range(options.rounds):
            output = Path(folder) / str(number)
            for scheme in ("w8a8", "w8a8-dynamic"):
                command: list[str | Path] = [
                    sys.executable,
                    "-m",
                    "qtool",
                    "quantize",
                    model,
                    "--output",
                    output / scheme,
                    "--quiet",
                ]
                command += ["--scheme", scheme, "--calibration", text, "--samples", size[0], "--seq-len", size[1]]
                runs.setdefault(f"qtool {scheme}", []).append(measure(command, PYTHONPATH=str(REPOSITORY)))
            if python:
                command = [python, PEER, model, text, *size, output / "peer"]
                runs.setdefault("llm-compressor SmoothQuant", []).append(measure(command))
    columns = ["command", "seconds", "peak MB: process", "its worker", "tree together"]
    rows = [
        [
            name,
            spread([run.seconds for run in measured]),
            *(spread([getattr(run, part) / 1e6 for run in measured], 0) for part in ("parent", "worker", "together")),
        ]
        for name, measured in runs.items()
    ]
    print(f"{model.name}, {size[0]} x {size[1]} tokens, {options.rounds} rounds: median (least to most)\n")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
