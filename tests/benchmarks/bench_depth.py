"""Peak memory of `qtool quantize` for the first 8, 16, 30, … layers of one model: it must not grow with depth."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, builtin_text, cut, measure, model_or_exit, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, help="a .txt file; default: CPython's own help texts")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 30])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    model = model_or_exit(options.model)
    deepest = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = options.text or builtin_text(folder, options.samples * options.seq_len)
        for layers in sorted({min(layers, deepest) for layers in options.layers}):
            source = cut(model, layers, folder / f"{layers}-layers")
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "qtool",
                "quantize",
                source,
                "--output",
                folder / f"{layers}-out",
            ]
            command += ["--calibration", text, "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
            run = measure([*command, "--quiet"], PYTHONPATH=str(REPOSITORY))
            weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            megabytes = [f"{part / 1e6:.0f}" for part in (weights, run.parent, run.worker, run.together)]
            rows.append([str(layers), f"{run.seconds:.1f}", *megabytes])
    print(f"{model.name}, {options.samples} x {options.seq_len} tokens\n")
    print(table(["layers", "seconds", "weights MB", "peak MB: process", "its worker", "tree together"], rows))


if __name__ == "__main__":
    main()
