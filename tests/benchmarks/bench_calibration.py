"""KL divergence on several kinds of text of one scheme that was calibrated on several texts.

usage: bench_calibration.py --held-out FILE ... [--texts builtin self FILE ...] [--scheme NAME ...] [--seeds N]

`qtool quantize --calibration` takes 32 x 512 tokens of each text, and what it makes is judged by `_judge.py`
on the first windows of each held-out file. Seeds order the built-in text, and are those of what the model writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, measure, model_or_exit, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", default=("builtin", "self"))
    parser.add_argument("--scheme", nargs="+", default=("w8a8",))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of each held-out text")
    args = parser.parse_args()
    model = model_or_exit(args.model)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        for scheme in args.scheme:
            for text in args.texts:
                for seed in range(args.seeds if text in ("builtin", "self") else 1):
                    name = f"{scheme}, {Path(text).name}, seed {seed}"
                    made[name] = Path(folder) / str(len(made))
                    command: list[str | Path] = [
                        sys.executable,
                        "-m",
                        "qtool",
                        "quantize",
                        model,
                        "--output",
                        made[name],
                    ]
                    command += ["--scheme", scheme, "--calibration", text, "--samples", "32", "--seq-len", "512"]
                    measure([*command, "--seed", str(seed)], PYTHONPATH=str(REPOSITORY))
        found = {text: _judged(model, text, args.windows, list(made.values())) for text in args.held_out}
    rows = [[name, *(found[text][at] for text in args.held_out)] for at, name in enumerate(made)]
    print(table(["scheme, calibrated on", *(text.name for text in args.held_out)], rows))


def _judged(model: Path, text: Path, windows: int, made: list[Path]) -> list[str]:
    """Of each checkpoint the KL divergence with its standard error."""
    judge = Path(__file__).with_name("_judge.py")
    command = [sys.executable, judge, model, text, windows, 512, *made]
    said = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return [f"{line['kl']:.5f} ± {line['error']:.5f}" for line in lines]


if __name__ == "__main__":
    main()
