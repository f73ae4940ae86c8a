"""Exact OSL against an output of mindspore-gs 1.4.1: what differs, and seconds per layer.

usage: bench_exact_osl.py MODEL REFERENCE

MODEL is a float32 checkpoint; REFERENCE a folder with mindspore-gs's shards for it (OSL on every linear) and
calibration_ids.json, the token ids it calibrated on. Golden Stick itself took 182 to 284 s per layer of
SmolLM2-135M on 2x128 tokens (2 cores).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from qtool.engines import native
from qtool.engines.job import CalibrationText, CalibrationTokens, OutputFolder, QuantizationJob
from qtool.recipe.load import load


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def main(model: Path, reference: Path) -> None:
    ids = json.loads((reference / "calibration_ids.json").read_text())
    laps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        job = QuantizationJob(
            model=model,
            output=OutputFolder(Path(folder) / "out", "golden-stick"),
            recipe=load("golden-stick-osl"),
            scheme="w8a8",
            calibration=CalibrationText("given", len(ids), len(ids[0]), tokens=CalibrationTokens(ids, "", "")),
            device="cpu",
        )
        done = native.quantize(job, lambda _event: laps.append(time.perf_counter()))
        mine, theirs = tensors(Path(folder) / "out"), tensors(reference)
    print("alphas", [group.alpha for group in done.report.layers])
    weights = {n: float((mine[n] == t).float().mean()) for n, t in theirs.items() if n.endswith("_proj.weight")}
    scales = [float(((mine[n] - t).abs() / t).max()) for n, t in theirs.items() if n.endswith("input_scale")]
    offsets = [bool((mine[n] == t).all()) for n, t in theirs.items() if n.endswith("input_offset")]
    worst = min(weights, key=lambda name: weights[name])
    print(f"int8 weights equal: least {weights[worst]:.4%} ({worst}), mean {sum(weights.values()) / len(weights):.4%}")
    print(f"input scales: largest relative difference {max(scales):.1e}; offsets equal: {sum(offsets)}/{len(offsets)}")
    seconds = [b - a for a, b in pairwise(laps)]
    print("seconds per layer:", ", ".join(f"{s:.2f}" for s in seconds))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print("left out: it needs a MODEL and a REFERENCE, see its first lines", file=sys.stderr)
