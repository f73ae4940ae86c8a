"""Throughput of `qtool convert` between formats, against copying the folder.

    python tests/benchmarks/bench_convert.py [--model MODEL] [--megabytes 1000] [--rounds 5] [--folder DIR]

The model is quantized with plain rounding and its layers repeated until it is large enough, so that starting Python
and importing torch (shown apart) don't hide the rate. The ways take turns. Every copy and conversion ends with its
bytes on the disk (fsync); the source is in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.benchmarks._common import DEFAULT_MODEL, measure, model_or_exit, spread, table  # noqa: E402


def make(model: Path, output: Path, nbytes: int) -> None:
    """A static compressed-tensors checkpoint of about `nbytes`, from a float model's layers over and over."""
    import torch

    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.checkpoint.writer import CheckpointWriter, Sharding
    from qtool.quant.types import QuantizedLinear
    from qtool.scheme import W8A8

    source, form = Checkpoint.open(model), formats.get("compressed-tensors")
    written, layer = 0, 0
    with CheckpointWriter(output, form, sharding=Sharding(expected_tensors=200_000)) as writer:
        outside = [name for name in source.names if ".layers." not in name]
        inside = [name for name in source.names if ".layers." in name]
        for name in outside:
            writer.add(name, source.tensor(name))
        while written < nbytes:
            for name in inside:
                before, _, rest = name.partition(".layers.")
                number, _, rest = rest.partition(".")
                renamed = f"{before}.layers.{layer + int(number)}.{rest}"
                tensor = source.tensor(name)
                if tensor.ndim == 2:
                    scale = tensor.float().abs().amax(1).clamp(min=1e-6) / 127
                    scale = form.storable_weight_scale(scale, W8A8, torch.bfloat16)
                    integers = (tensor.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
                    linear = QuantizedLinear(W8A8, integers, scale, None, form.storable_scale(0.05, torch.bfloat16), 11)
                    writer.add_linear(renamed.removesuffix(".weight"), linear, torch.bfloat16)
                else:
                    writer.add(renamed, tensor)
                written += tensor.numel()
            layer += source.config["num_hidden_layers"]
        writer.finish(source, source.config | {"num_hidden_layers": layer}, {})


def copy(source: Path, target: Path) -> float:
    """Seconds that a plain copy of the folder takes, until it is on the disk."""
    started = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def convert(source: Path, target: Path, to: str) -> tuple[float, float, int]:
    """Seconds of the whole command and of the conversion in it, and the worker's peak memory in bytes."""
    result = target.with_suffix(".json")
    code = "import sys; from qtool.cli.app import run; sys.stdout = open(sys.argv.pop(1), 'w'); sys.exit(run())"
    command: list[str | Path] = [
        sys.executable,
        "-c",
        code,
        result,
        "convert",
        source,
        "--to",
        to,
        "--output",
        target,
        "--json",
    ]
    measured = measure([*command, "--quiet"], PYTHONPATH=str(REPOSITORY))
    return measured.seconds, json.loads(result.read_text())["seconds"], measured.worker


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    arguments = parser.parse_args()
    model = model_or_exit(arguments.model)
    targets = ("golden-stick", "modelslim", "bfloat16")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = folder / "source"
        make(model, source, arguments.megabytes * 10**6)
        megabytes = sum(file.stat().st_size for file in source.iterdir()) / 1e6
        seconds: dict[str, list[float]] = {way: [] for way in ("copy", *targets)}
        whole: dict[str, list[float]] = {way: [] for way in targets}
        memory: dict[str, int] = {}
        for _ in range(arguments.rounds):
            seconds["copy"].append(copy(source, folder / "copy"))
            shutil.rmtree(folder / "copy")
            for to in targets:
                total, inside, memory[to] = convert(source, folder / to, to)
                whole[to].append(total)
                seconds[to].append(inside)
                shutil.rmtree(folder / to)
        subprocess.run(["sync"], check=True)
    rows = [
        [
            way,
            spread([megabytes / s for s in times], 0),
            f"{statistics.median(times) / statistics.median(seconds['copy']):.2f}",
            spread(whole[way]) if way in whole else "",
            f"{memory[way] / 1e6:.0f}" if way in memory else "",
        ]
        for way, times in seconds.items()
    ]
    print(f"{megabytes:.0f} MB of compressed-tensors, {arguments.rounds} rounds\n")
    print(table(["to", "MB/s of the source", "time, copy = 1", "whole command, s", "worker's peak, MB"], rows))


if __name__ == "__main__":
    main()
