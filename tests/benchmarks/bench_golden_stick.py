"""mindspore-gs itself against the native engine's exact mode: the same result, in how much less time.

usage: bench_golden_stick.py [--model FOLDER] [--layers N] [--samples N] [--seq-len N]

The first layers of a model, in float32, every linear static with OSL. Needs the golden-stick environment; two layers
of SmolLM2-135M on 2 x 128 tokens take it several minutes. The times are those of the layers alone: neither engine's
start, loading or saving counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import DEFAULT_MODEL, cut, model_or_exit, table


class Clock:
    """Notes when each layer begins and the last one ends."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self.running = False

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] != "progress":
            return
        layers = event["stage"] == "quantize"
        if layers or self.running:
            self.laps.append(time.perf_counter())
        self.running = layers and event["done"] < event["total"]

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.laps, self.laps[1:], strict=False)]


def in_float32(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    from qtool import engines
    from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
    from qtool.environments.lookup import interpreter
    from qtool.errors import InputError
    from qtool.recipe.load import load

    try:
        interpreter("golden-stick")
    except InputError as error:
        print(f"left out: {error}. {error.hint}", file=sys.stderr)
        return
    clocks, reports, results = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = cut(model_or_exit(arguments.model), arguments.layers, Path(folder) / "model")
        in_float32(model)
        for engine in ("native", "golden-stick"):
            job = QuantizationJob(
                model=model,
                output=OutputFolder(Path(folder) / engine, "golden-stick"),
                recipe=load("golden-stick-osl"),
                scheme="w8a8",
                calibration=CalibrationText("builtin", arguments.samples, arguments.seq_len),
                device="cpu",
            )
            clocks[engine] = Clock()
            reports[engine] = engines.quantize(engine, job, clocks[engine].event)
            results[engine] = tensors(Path(folder) / engine)
    rows = [
        [
            engine,
            ", ".join(f"{s:.2f}" for s in clock.seconds),
            f"{sum(clock.seconds):.2f}",
            f"{reports[engine].peak_memory_bytes / 1e9:.2f} GB",
        ]
        for engine, clock in clocks.items()
    ]
    print(table(["engine", "seconds per layer", "together", "peak memory"], rows))
    print(f"native is {sum(clocks['golden-stick'].seconds) / sum(clocks['native'].seconds):.0f} times faster")
    chosen = {engine: [group.alpha for group in done.report.layers] for engine, done in reports.items()}
    print(f"alphas {'equal' if chosen['native'] == chosen['golden-stick'] else chosen}")
    mine, theirs = results["native"], results["golden-stick"]
    weights = {
        name: float((mine[name] == t).float().mean()) for name, t in theirs.items() if name.endswith("_proj.weight")
    }
    worst = min(weights, key=lambda name: weights[name])
    print(f"int8 weights equal: least {weights[worst]:.4%} ({worst}), mean {sum(weights.values()) / len(weights):.4%}")
    scales = [float(((mine[n] - t).abs() / t).max()) for n, t in theirs.items() if n.endswith("input_scale")]
    offsets = [bool((mine[n] == t).all()) for n, t in theirs.items() if n.endswith("input_offset")]
    print(f"input scales: largest relative difference {max(scales):.1e}; offsets equal: {sum(offsets)}/{len(offsets)}")


if __name__ == "__main__":
    main()
