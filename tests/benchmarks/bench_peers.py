"""KL divergence, size and time of qtool's schemes beside what llm-compressor, auto-round and ModelOpt make.

usage: bench_peers.py --calibration FILE --held-out FILE [--model DIR] [--windows N] [--only NAME ...] [--iterations N]

All quantize the same model on the first 32 x 512 tokens of one file; all are judged by `_judge.py` on another, with
transformers in float32. It loads checkpoints of compressed-tensors; auto-round's weights are judged as the floats that
they stand for, and ModelOpt's model as ModelOpt simulates it. QTOOL_BENCH_LLMCOMPRESSOR_PYTHON,
QTOOL_BENCH_AUTOROUND_PYTHON and QTOOL_BENCH_MODELOPT_PYTHON name interpreters that have them (measured with
llmcompressor 0.14.0.1, auto-round 0.16.1, nvidia-modelopt 0.47.0); who has none is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, measure, model_or_exit, table

HERE = Path(__file__).parent
SIZE = ("32", "512")
QTOOL = ("w8a8", "w8a8-dynamic", "w8a8-asymmetric", "w4a16-g64", "w4a8-g64", "fp8-dynamic", "w8a16")
EFFORT_HIGH = ("w8a8", "w8a8-dynamic", "w8a8-asymmetric", "w4a16-g64", "w4a8-g64")  # these once more
LLM_COMPRESSOR = (
    ("w8a8", "nearest"), ("w8a8", "gptq"), ("w4a16", "gptq"), ("w4a16", "awq"), ("w4a8", "gptq"), ("fp8", "nearest"),
    ("w8a16", "gptq"),
)  # fmt: skip
AUTO_ROUND = ("w8a8", "w4a16", "mix:6")
MODELOPT = ("w8a8", "w4a16", "mix:8.1", "w8a16", "fp8")  # 8.1 with the output projection: 6 without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--iterations", default="0", help="of auto-round's rounding; 0 is nearest, its default is 200")
    parser.add_argument("--only", nargs="+", default=("qtool", "llm-compressor", "auto-round", "modelopt"))
    args = parser.parse_args()
    model = model_or_exit(args.model)
    rows: list[tuple[str, str, float, Path | dict[str, float]]] = []  # a folder to judge, or what was found

    with tempfile.TemporaryDirectory() as folder:
        base: list[str | Path] = [model, args.calibration, *SIZE]
        asked = [(scheme, "normal") for scheme in QTOOL] + [(scheme, "high") for scheme in EFFORT_HIGH]
        for scheme, effort in asked if "qtool" in args.only else ():
            made = Path(folder) / f"qtool-{scheme}-{effort}"
            command: list[str | Path] = [sys.executable, "-m", "qtool", "quantize", model, "--scheme", scheme]
            command += ["--output", made, "--calibration", args.calibration, "--samples", SIZE[0], "--seq-len", SIZE[1]]
            done = measure([*command, "--effort", effort], PYTHONPATH=str(REPOSITORY))
            rows.append(("qtool", f"{scheme}, effort {effort}", done.seconds, made))
        if (python := _python("LLMCOMPRESSOR")) and "llm-compressor" in args.only:
            for scheme, rounding in LLM_COMPRESSOR:
                made = Path(folder) / f"llm-compressor-{scheme}-{rounding}"
                done = measure([python, HERE / "_llm_compressor.py", *base, made, scheme, rounding])
                rows.append(("llm-compressor", f"{scheme}, {rounding}", done.seconds, made))
        if (python := _python("AUTOROUND")) and "auto-round" in args.only:
            for scheme in AUTO_ROUND:
                made = Path(folder) / f"auto-round-{scheme.replace(':', '-')}"
                done = measure([python, HERE / "_auto_round.py", *base, made, scheme, args.iterations])
                rows.append(("auto-round", f"{scheme}, {args.iterations} iterations", done.seconds, made))
        if (python := _python("MODELOPT")) and "modelopt" in args.only:
            for scheme in MODELOPT:
                done = measure([python, HERE / "_modelopt.py", *base, args.held_out, str(args.windows), scheme])
                found = json.loads(done.said.splitlines()[-1])
                rows.append(("ModelOpt", scheme, found["seconds"], found))
        folders = [made for *_, made in rows if isinstance(made, Path)]
        command = [sys.executable, HERE / "_judge.py", model, args.held_out, str(args.windows), SIZE[1], *folders]
        said = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
        lines = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
        shown = []
        for who, scheme, seconds, what in rows:
            found = next(lines) if isinstance(what, Path) else what
            size = sum(file.stat().st_size for file in what.glob("*.safetensors")) if isinstance(what, Path) else 0
            kl = f"{found['kl']:.5f} ± {found['error']:.5f}"
            shown.append([who, scheme, kl, f"{found['top1']:.1%}", f"{size / 1e6:.1f}", f"{seconds:.0f}"])
    print(table(["who", "scheme", "KL divergence", "top-1", "MB", "seconds"], shown))


def _python(name: str) -> str | None:
    found = os.environ.get(f"QTOOL_BENCH_{name}_PYTHON")
    if not found:
        print(f"QTOOL_BENCH_{name}_PYTHON names no interpreter: left out", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
