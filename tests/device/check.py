"""Check `qtool quantize --device cuda` on a machine that has one: right numbers, and what a layer costs.

    python tests/device/check.py                 all cases, in less than eight minutes on one H100
    python tests/device/check.py --quick         a tiny model, and one layer
    python tests/device/check.py --only llama-3-8b-128x512 --json figures.json

Needs torch, transformers, safetensors, numpy and what qtool itself needs; no network: weights are random, made here.

Numbers: tiny models are quantized on the CPU and on the device with the same calibration text. Compared are their
integers and scales, and how far each is from the float model: the mean Kullback-Leibler divergence of its logits over
windows of other text, with a 95 % interval. The two agree when their intervals meet.

Costs: models of a few equal decoder layers in the real shape. `layer s` is the median time from one layer's begin to
the next one's, the first and the last left out: what each further layer of a whole model costs. `first` is that of a
model's first layer, and of its end: finding the layer's structure, recording graphs, writing what still waits.
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from tests import families, simulate
from tests.benchmarks._common import table
from tests.device import models, watch
from tests.device.watch import REPOSITORY, Place, Run

_DEVICE = os.environ.get("CHECK_DEVICE", "cuda")  # "cpu" tries this script itself, with small shapes
_SMALL = _DEVICE == "cpu"
_WAYS = {
    "w8a8": ("--scheme", "w8a8"),
    "w8a8-dynamic": ("--scheme", "w8a8-dynamic"),
    "w8a8-dynamic, effort high": ("--scheme", "w8a8-dynamic", "--effort", "high"),
}
_HIGH = "-effort-high"
_LAYERS = 4
_WINDOWS, _WINDOW = 64, 128  # of text that the divergence is measured on
_SIZES = {"128x512": (128, 512), "128x2048": (128, 2048), "512x2048": (512, 2048)}
_TIMED = [  # the most telling first
    "llama-3-8b-128x2048",
    "qwen3-32b-128x512",
    f"deepseek-r1-{models.R1_EXPERTS}-experts-128x512",
    "llama-3-70b-128x512",
    "llama-3-8b-128x512",
    "qwen3-32b-128x2048",
    "llama-3-70b-128x2048",
    "llama-3-8b-512x2048",
    f"llama-3-8b-128x512{_HIGH}",
]
_CASES = [*(f"numbers-{model_type}" for model_type in models.TINY), *_TIMED]
_QUICK = ("numbers-llama", "llama-3-8b-128x512")
_LONGEST = 10  # places to name per case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(_QUICK)}")
    parser.add_argument("--only", action="append", choices=_CASES, metavar="NAME", help=f"one of {', '.join(_CASES)}")
    parser.add_argument("--kernels", action="store_true", help="also what the device computes in the second layer")
    parser.add_argument("--budget", type=float, default=450, help="seconds; what is not done by then is left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here")
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = [name for name in _CASES if name in (options.only or (_QUICK if options.quick else _CASES))]
    end = time.time() + options.budget
    figures: dict[str, Any] = {"machine": _machine(), "numbers": [], "costs": []}
    with tempfile.TemporaryDirectory(prefix="qtool-check-") as name:
        for case in _cases(wanted, Path(name), end, kernels=options.kernels):
            kind = "numbers" if "scheme" in case else "costs"
            figures[kind].append(case)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
    _show(figures)
    fine = all(case["agree"] for case in figures["numbers"]) and not any(c["error"] for c in figures["costs"])
    sys.exit(0 if fine else 1)


def _cases(wanted: list[str], folder: Path, end: float, *, kernels: bool) -> Iterator[dict[str, Any]]:
    tiny = [name.removeprefix("numbers-") for name in wanted if name.startswith("numbers-")]
    if tiny:
        yield from _numbers(tiny, folder)
    for name in wanted:
        if name in _TIMED:
            left = end - time.time()
            if left < 10:
                print(f"{name}: left out, no time", file=sys.stderr)
                continue
            yield _cost(name, folder, end, kernels=kernels)


# ---------------------------------------------------------------- numbers


def _numbers(model_types: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Quantize each on both devices, all at once, and compare."""
    tokenizer = families.train_tokenizer(512)
    sources = {model_type: models.tiny(folder / model_type, model_type, tokenizer) for model_type in model_types}
    jobs = [(kind, way, device) for kind in model_types for way in _WAYS for device in ("cpu", _DEVICE)]
    outputs = [folder / f"{kind}-{i}" for i, (kind, _, _) in enumerate(jobs)]
    common = ["--format", "compressed-tensors", "--threads", "2", "--samples", "32", "--seq-len", "256"]

    def run(job: tuple[str, str, str], output: Path) -> Run:
        kind, way, device = job
        return watch.quantize(sources[kind], output, [*_WAYS[way], "--device", device, *common])

    begin = time.time()
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) - 2)) as pool:
        runs = [*pool.map(run, jobs, outputs)]
    print(f"{len(jobs)} tiny models quantized in {time.time() - begin:.1f} s", file=sys.stderr, flush=True)
    ids = _held_out(tokenizer)
    for kind in model_types:
        model = simulate.load_float(sources[kind])
        routes = simulate.routes(model, ids) if hasattr(model.config, "num_experts_per_tok") else {}
        reference = simulate.logits(model, ids)
        for way in _WAYS:
            pair = [i for i, job in enumerate(jobs) if job[:2] == (kind, way)]
            case: dict[str, Any] = {"name": kind, "scheme": way}
            if errors := [runs[i].error for i in pair if runs[i].error]:
                print("\n".join(errors), file=sys.stderr)
                yield case | {"agree": False, "error": errors}
                continue
            cpu, device = (outputs[i] for i in pair)
            yield case | _differences(cpu, device) | _divergences(cpu, device, ids, routes, reference)


def _held_out(tokenizer: Any) -> torch.Tensor:
    """Token numbers [windows, tokens] of English text; some of it was in the calibration."""
    from pydoc_data.topics import topics

    words = "\n\n".join(topics[name] for name in reversed(sorted(topics)))
    return torch.tensor(tokenizer(words)["input_ids"][: _WINDOWS * _WINDOW]).view(_WINDOWS, _WINDOW)


def _differences(cpu: Path, device: Path) -> dict[str, Any]:
    """Of integers: least and mean share over the linears of a kind that are equal, and that differ by no more than 1.

    Of scales: the largest relative difference, of the weights' and of the inputs'.
    """
    expected, found = families.load(cpu), families.load(device)
    assert expected.keys() == found.keys()
    equal: dict[str, list[float]] = defaultdict(list)
    near: dict[str, list[float]] = defaultdict(list)
    scales: dict[str, list[float]] = defaultdict(list)
    for name, tensor in expected.items():
        other = found[name]
        if tensor.dtype == torch.int8 and name.endswith(".weight"):
            linear = name.split(".")[-2]
            kind = f"experts.{linear}" if ".experts." in name else linear
            apart = (tensor.int() - other.int()).abs()
            equal[kind].append(float((apart == 0).float().mean()))
            near[kind].append(float((apart <= 1).float().mean()))
        elif name.endswith((".weight_scale", ".input_scale")):
            part = name.rpartition(".")[2]
            scales[part] += ((other.float() - tensor.float()).abs() / tensor.float().abs()).flatten().tolist()
    return {
        "equal": {kind: {"min": min(shares), "mean": _mean(shares)} for kind, shares in equal.items()},
        "within_1": {kind: {"min": min(shares), "mean": _mean(shares)} for kind, shares in near.items()},
        "scales": {part: {"max": max(apart), "mean": _mean(apart)} for part, apart in scales.items()},
    }


def _divergences(
    cpu: Path, device: Path, ids: torch.Tensor, routes: simulate.Routes, reference: torch.Tensor
) -> dict[str, Any]:
    """Mean and half a 95 % interval of each, and of their difference window by window."""
    per_window = []
    for folder in (cpu, device):
        logits = simulate.logits(simulate.load(folder), ids, routes)
        pairs = zip(logits, reference, strict=True)
        per_window.append(torch.tensor([simulate.divergence(one, of_float) for one, of_float in pairs]))
    first, second, apart = (_interval(x) for x in (*per_window, per_window[1] - per_window[0]))
    agree = abs(first["mean"] - second["mean"]) <= first["half"] + second["half"]
    return {"kl_cpu": first, "kl_device": second, "kl_difference": apart, "agree": agree, "error": []}


def _interval(x: torch.Tensor) -> dict[str, float]:
    return {"mean": float(x.mean()), "half": 1.96 * float(x.std()) / len(x) ** 0.5}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- costs


def _cost(name: str, folder: Path, end: float, *, kernels: bool) -> dict[str, Any]:
    shape, _, size = name.removesuffix(_HIGH).rpartition("-")
    samples, length = (8, 64) if _SMALL else _SIZES[size]
    begin = time.time()
    source, text = folder / shape, folder / f"{size}.txt"
    if not source.exists():
        models.layers(source, shape, count=_LAYERS, small=_SMALL)
    if not text.exists():
        models.text(text, samples * length)
    made = time.time() - begin
    options: list[str | Path] = ["--device", _DEVICE, "--calibration", text]
    options += ["--samples", str(samples), "--seq-len", str(length), *models.SHAPES[shape].options]
    options += ["--effort", "high"] if name.endswith(_HIGH) else []
    output = folder / name
    run = watch.quantize(source, output, options, max(5.0, end - time.time()), kernels=kernels)
    _remove(output)
    said = run.error or f"{run.seconds:.1f} s"
    print(f"{name}: {said} (weights made in {made:.1f} s)", file=sys.stderr, flush=True)
    about = {"name": name, "samples": samples, "seq_len": length, "layers": _LAYERS}
    about |= {"pace": statistics.median(run.paces) if run.paces else None}
    return about | vars(run) | {"start": _described(run.start), "places": _described(run.places)}


def _described(places: list[Place]) -> list[dict[str, Any]]:
    """For JSON, with the longest lines' text."""
    return [
        {
            "file": place.file,
            "function": place.function,
            "thread": place.thread,
            "seconds": round(place.seconds, 3),
            "lines": {
                f"{line}: {linecache.getline(str(REPOSITORY / 'qtool' / place.file), line).strip()}": round(seconds, 3)
                for line, seconds in sorted(place.lines.items(), key=lambda item: -item[1])[:5]
            },
        }
        for place in places[:40]
    ]


def _remove(folder: Path) -> None:
    """A result, and what a stopped run left beside it."""
    import shutil

    for path in folder.parent.glob(f"*{folder.name}*"):
        if path.is_dir():
            shutil.rmtree(path)


def _machine() -> dict[str, Any]:
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        # Without these the CPU's results are computed in float32, the device's in bfloat16.
        "bfloat16_on_cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }
    from importlib.metadata import version

    return about | {"transformers": version("transformers")}


# ---------------------------------------------------------------- tables


def _show(figures: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()), end="\n\n")
    if figures["numbers"]:
        columns = ["model", "scheme", "equal integers: least (mean)", "within 1", "scales apart: most (mean)"]
        columns += ["KL, CPU", "KL, device", "device - CPU", "agree"]
        print(table(columns, [_numbers_row(case) for case in figures["numbers"]]), end="\n\n")
        kinds = [
            [case["name"], case["scheme"], kind, f"{share['min']:.4f}", f"{share['mean']:.4f}"]
            for case in figures["numbers"]
            for kind, share in case.get("equal", {}).items()
        ]
        print(table(["model", "scheme", "linears", "equal integers: least", "mean"], kinds), end="\n\n")
    if figures["costs"]:
        columns = [
            "layer, calibration",
            "seconds",
            "layer s",
            "first",
            "device busy",
            "peak GB: host",
            "tensors on device",
        ]
        columns += ["device in all", ""]
        print(table(columns, [_cost_row(case) for case in figures["costs"]]), end="\n\n")
        rows = [row for case in figures["costs"] for row in _place_rows(case)]
        print(table(["layer, calibration", "function", "seconds", "share", "its longest line"], rows))
        most = [(case["name"], each) for case in figures["costs"] for each in case["kernels"][: 2 * _LONGEST]]
        if most:
            rows = [[name, kernel[:90], f"{seconds:.3f}", str(count)] for name, (kernel, seconds, count) in most]
            print(table(["layer, calibration", "on the device, in the second layer", "seconds", "times"], rows))


def _numbers_row(case: dict[str, Any]) -> list[str]:
    if case["error"]:
        return [case["name"], case["scheme"], *[""] * 6, "failed"]
    equal, near, scales = case["equal"].values(), case["within_1"].values(), case["scales"].values()
    difference = case["kl_difference"]
    return [
        case["name"],
        case["scheme"],
        f"{min(s['min'] for s in equal):.4f} ({_mean([s['mean'] for s in equal]):.4f})",
        f"{min(s['min'] for s in near):.5f}",
        f"{max(s['max'] for s in scales):.1e} ({_mean([s['mean'] for s in scales]):.1e})",
        *(f"{case[key]['mean']:.5f} ± {case[key]['half']:.5f}" for key in ("kl_cpu", "kl_device")),
        f"{difference['mean']:+.5f} ± {difference['half']:.5f}",
        "yes" if case["agree"] else "NO",
    ]


def _cost_row(case: dict[str, Any]) -> list[str]:
    used = case["device_used"]
    return [
        case["name"],
        f"{case['seconds']:.1f}",
        "" if case["pace"] is None else f"{case['pace']:.2f}",
        "" if case["pace"] is None else f"{case['layer_seconds'] - (case['layers'] - 1) * case['pace']:.1f}",
        "" if case["load"] is None else f"{100 * case['load']:.0f} %",
        f"{case['host_bytes'] / 1e9:.2f}",
        f"{case['device_bytes'] / 1e9:.2f}",
        "" if used is None else f"{used / 1e9:.2f}",
        case["error"].splitlines()[0] if case["error"] else "",
    ]


def _place_rows(case: dict[str, Any]) -> list[list[str]]:
    """Where the layer's time went, and in brackets the time before."""
    rows = []
    before = max(case["seconds"] - case["layer_seconds"], 1e-9)
    for places, most, total, name in (
        (case["start"], _LONGEST // 3, before, f"({case['name']})"),
        (case["places"], _LONGEST, max(sum(case["paces"]) or case["layer_seconds"], 1e-9), case["name"]),
    ):
        for place in places[:most]:
            (line, seconds), *_ = place["lines"].items()
            where, share = f"{place['file']} {place['function']}", f"{100 * place['seconds'] / total:.0f} %"
            rows.append([name, where, f"{place['seconds']:.1f}", share, f"{seconds:.1f} in {line[:70]}"])
    return rows


if __name__ == "__main__":
    main()
