"""KL divergence, size and cost of qtool's schemes beside what llm-compressor, auto-round and ModelOpt make.

usage: bench_peers.py --calibration FILE --held-out FILE [--model DIR] [--windows N] [--only NAME ...] [--keep DIR]

All quantize the same model on the first 32 x 512 tokens of one file; all are judged by `_judge.py` on another, with
transformers in float32. It loads checkpoints of compressed-tensors; auto-round's weights are judged as the floats that
they stand for, and ModelOpt's model as ModelOpt simulates it. QTOOL_BENCH_LLMCOMPRESSOR_PYTHON,
QTOOL_BENCH_AUTOROUND_PYTHON and QTOOL_BENCH_MODELOPT_PYTHON name interpreters that have them (measured with
llmcompressor 0.14.0.1, auto-round 0.16.1, nvidia-modelopt 0.47.0); who has none is left out.

With --keep, the models and what was found stay in a folder, below the name of the calibration file, and what is there
already is not done again: an interrupted run goes on, and another text can be judged. ModelOpt's models are in memory
alone; their time is what ModelOpt took, and their memory includes that of judging.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, measure, model_or_exit, table

HERE = Path(__file__).parent
SIZE = ("32", "512")
TOOLS = ("qtool", "llm-compressor", "auto-round", "modelopt")
QTOOL = (
    "w8a8", "w8a8-dynamic", "w8a8-asymmetric", "w4a16-g64", "w4a16-asymmetric-g64", "w4a8-g64",
    "fp8-dynamic", "w8a16",
)  # fmt: skip
EFFORT_HIGH = ("w8a8-dynamic", "w8a8", "w8a8-asymmetric", "w4a16-g64", "w4a16-asymmetric-g64", "w4a8-g64")  # once more
LLM_COMPRESSOR = (
    ("w8a8", "nearest"), ("w8a8", "gptq"), ("w4a16", "gptq"), ("w4a16", "awq"), ("w4a8", "gptq"), ("fp8", "nearest"),
    ("w8a16", "gptq"),
)  # fmt: skip
AUTO_ROUND = ("w8a8", "w4a16", "w8a16", "mix:6")
MODELOPT = ("w8a8", "w4a16", "mix:8.1", "w8a16", "fp8")  # 8.1 with the output projection: 6 without


@dataclass(frozen=True)
class Run:
    """One model to make.

    Attributes:
        folder: where it is written; ModelOpt writes none, and judges it in the same process.
    """

    tool: str
    scheme: str
    command: list[str | Path]
    folder: Path


def runs(args: argparse.Namespace, folder: Path) -> Iterator[Run]:
    def made(tool: str, scheme: str) -> Path:
        return folder / f"{tool}-{scheme}".replace(", ", "-").replace(" ", "-").replace(":", "-")

    base: list[str | Path] = [args.model, args.calibration, *SIZE]
    for scheme, effort in [(scheme, "normal") for scheme in QTOOL] + [(scheme, "high") for scheme in EFFORT_HIGH]:
        name = f"{scheme}, effort {effort}"
        command: list[str | Path] = [sys.executable, "-m", "qtool", "quantize", args.model, "--scheme", scheme]
        command += ["--calibration", args.calibration, "--samples", SIZE[0], "--seq-len", SIZE[1], "--effort", effort]
        yield Run("qtool", name, [*command, "--output", made("qtool", name)], made("qtool", name))
    if python := _python("LLMCOMPRESSOR"):
        for scheme, rounding in LLM_COMPRESSOR:
            name = f"{scheme}, {rounding}"
            command = [python, HERE / "_llm_compressor.py", *base, made("llm-compressor", name), scheme, rounding]
            yield Run("llm-compressor", name, command, made("llm-compressor", name))
    if python := _python("AUTOROUND"):
        for scheme in AUTO_ROUND:
            name = f"{scheme}, {args.iterations} iterations"
            command = [python, HERE / "_auto_round.py", *base, made("auto-round", name), scheme, args.iterations]
            yield Run("auto-round", name, command, made("auto-round", name))
    if python := _python("MODELOPT"):
        for scheme in MODELOPT:
            command = [python, HERE / "_modelopt.py", *base, args.held_out, str(args.windows), scheme]
            yield Run("modelopt", scheme, command, made("modelopt", scheme))


def judge(args: argparse.Namespace, folders: list[Path]) -> list[dict[str, Any]]:
    command = [sys.executable, HERE / "_judge.py", args.model, args.held_out, str(args.windows), SIZE[1], *folders]
    said = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--iterations", default="0", help="of auto-round's rounding; 0 is nearest, its default is 200")
    parser.add_argument("--only", nargs="+", default=TOOLS, help="tools, or names of models as --keep has them")
    parser.add_argument("--keep", type=Path, help="a folder for the models and for what was found")
    args = parser.parse_args()
    model_or_exit(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = (args.keep or Path(temporary)) / args.calibration.stem
        folder.mkdir(parents=True, exist_ok=True)
        costs, found = Found(folder / "costs.json"), Found(folder / f"{args.held_out.stem}-{args.windows}.json")
        wanted = [run for run in runs(args, folder) if run.tool in args.only or run.folder.name in args.only]
        for run in wanted:
            in_memory = run.tool == "modelopt"
            if run.folder.name in (found if in_memory else costs):
                continue
            shutil.rmtree(run.folder, ignore_errors=True)  # what an interrupted run left
            done = measure(run.command, PYTHONPATH=str(REPOSITORY))
            seconds = done.processor
            if in_memory:
                found.keep(run.folder.name, figures := json.loads(done.said.splitlines()[-1]))
                seconds = figures["seconds"]
            size = sum(file.stat().st_size for file in run.folder.glob("*.safetensors"))
            costs.keep(run.folder.name, {"seconds": seconds, "memory": done.together, "size": size})
            print(run.folder.name, f"{seconds:.0f} s", file=sys.stderr, flush=True)
        missing = [run.folder for run in wanted if run.folder.name not in found]
        for made, figures in zip(missing, judge(args, missing) if missing else (), strict=True):
            found.keep(made.name, figures)
        rows = []
        for run in wanted:
            cost, figures = costs[run.folder.name], found[run.folder.name]
            kl = f"{figures['kl']:.5f} ± {figures['error']:.5f}"
            costly = [f"{cost['size'] / 1e6:.1f}", f"{cost['seconds']:.0f}", f"{cost['memory'] / 1e9:.2f}"]
            rows.append([run.tool, run.scheme, kl, f"{figures['top1']:.1%}", *costly])
    print(table(["tool", "scheme", "KL divergence", "top-1", "MB", "processor seconds", "peak GB"], rows))


class Found(dict[str, dict[str, Any]]):
    """What was measured, by the names of models, in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(json.loads(file.read_text()) if file.exists() else {})
        self._file = file

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        self[name] = figures
        self._file.write_text(json.dumps(self, indent=1))


def _python(name: str) -> str | None:
    found = os.environ.get(f"QTOOL_BENCH_{name}_PYTHON")
    if not found:
        print(f"QTOOL_BENCH_{name}_PYTHON names no interpreter: left out", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
