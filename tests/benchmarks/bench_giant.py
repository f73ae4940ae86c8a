"""Cost of `qtool quantize` on layers of DeepSeek-R1, in real size or small; and on a small mixture against a peer.

    bench_giant.py                                small layers: cost against depth, extrapolated to all of R1's layers
    bench_giant.py --size r1 --dense 1 --layers 1 one dense layer and one with experts in real size: 25 GB of disk
    bench_giant.py --peer                         a small Qwen3 mixture through qtool and llm-compressor, taking turns

Read and written bytes are what the whole process tree passed to read and write calls (rchar and wchar of
/proc/PID/io, which the kernel adds up over ended children); weights that are mapped into memory don't show there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks import giant
from tests.benchmarks._common import REPOSITORY, Measured, builtin_text, measure, spread, table
from tests.benchmarks.bench_quantize import PEER, peer_python

_R1_DENSE, _R1_LAYERS = giant.R1["first_k_dense_replace"], giant.R1["num_hidden_layers"]


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
        cpu: seconds of processor time, of all processes.
        read, written: bytes.
        disk: the most that the output's folder held, bytes, without the source.
        weights: bytes of the source's weights.
    """

    run: Measured
    cpu: float
    read: int
    written: int
    disk: int
    weights: int

    def row(self) -> list[str]:
        seconds, cores = self.run.seconds, len(os.sched_getaffinity(0))
        return [
            f"{self.weights / 1e9:.2f}",
            f"{seconds:.1f}",
            f"{100 * self.cpu / seconds / cores:.0f} %",
            f"{self.run.together / 1e9:.2f}",
            f"{self.run.worker / 1e9:.2f}",
            f"{self.read / self.weights:.2f}",
            f"{self.written / 1e9:.2f}",
            f"{self.disk / 1e9:.2f}",
        ]


COLUMNS = [
    "weights GB",
    "seconds",
    "CPU",
    "peak GB: tree",
    "largest process",
    "read per weight byte",
    "written GB",
    "peak disk GB",
]


def cost(source: Path, folder: Path, options: Sequence[str]) -> Cost:
    """Quantize `source` into `folder` and throw the result away."""
    folder.mkdir()
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "qtool",
        "quantize",
        source,
        "-o",
        folder / "out",
        "--quiet",
        *options,
    ]
    used, before = resource.getrusage(resource.RUSAGE_CHILDREN), _io()
    with _largest(folder) as largest:
        run = measure(command, PYTHONPATH=str(REPOSITORY))
    after, done = _io(), resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(folder)
    return Cost(
        run,
        cpu=done.ru_utime + done.ru_stime - used.ru_utime - used.ru_stime,
        read=after["rchar"] - before["rchar"],
        written=after["wchar"] - before["wchar"],
        disk=max(largest),
        weights=sum(file.stat().st_size for file in source.glob("*.safetensors")),
    )


def _io() -> dict[str, int]:
    """This process's counters: those of its children are added when they have ended."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


@contextmanager
def _largest(folder: Path) -> Iterator[list[int]]:
    """Watch how much a folder holds; the list has every size seen."""
    sizes, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            sizes.append(_held(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        sizes.append(_held(folder))
        ended.set()
        thread.join()


def _held(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_blocks * 512
            except OSError:  # it went meanwhile
                continue
    return total


def depth(options: argparse.Namespace, folder: Path) -> None:
    """One run per number of layers; a straight line through them, drawn on to DeepSeek-R1's own."""
    arguments = ["--recipe", "deepseek-r1-osl", "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    arguments += ["--overwrite", *options.options]
    costs: dict[int, Cost] = {}
    for layers in options.layers:
        source = giant.make(
            folder / "source", options.size, dense=options.dense, moe=layers, vocabulary=options.vocabulary
        )
        try:
            costs[layers] = cost(source, folder / "result", arguments)
        finally:
            shutil.rmtree(source)
        print(f"{layers} layers: {costs[layers].run.seconds:.1f} s", file=sys.stderr, flush=True)
    print(
        f"size {options.size}: {options.dense} dense layers and some with experts, {options.samples} x "
        f"{options.seq_len} tokens, qtool quantize {' '.join(arguments)}\n"
    )
    print(table(["layers with experts", *COLUMNS], [[str(layers), *one.row()] for layers, one in costs.items()]))
    if len(costs) > 1:
        print()
        extrapolate(costs, options.dense)


def extrapolate(costs: dict[int, Cost], dense: int) -> None:
    """cost = a + b x layers by least squares. R1 has 3 dense layers and 58 with experts.

    The dense ones cost less than those with experts. Without one among the runs all 61 count as layers with experts;
    with one, a (which holds it, and the start) is counted three times. Both are upper bounds.
    """
    times = _R1_DENSE if dense else 1
    deep = _R1_LAYERS - _R1_DENSE if dense else _R1_LAYERS
    layers = list(costs)
    figures = {
        "time": ([one.run.seconds for one in costs.values()], "s"),
        "peak memory of the tree": ([one.run.together / 1e9 for one in costs.values()], "GB"),
        "peak disk": ([one.disk / 1e9 for one in costs.values()], "GB"),
    }
    for name, (values, unit) in figures.items():
        b, a = np.polyfit(layers, values, 1)
        misses = np.abs(np.polyval([b, a], layers) - values).max()
        start = f"{times} x {a:.3f}" if times > 1 and name == "time" else f"{a:.3f}"
        total = (times if name == "time" else 1) * a + deep * b
        more = f" = {total / 3600:.2f} h" if unit == "s" else ""
        print(f"{name} = {a:.3f} + {b:.4f} x layers {unit} (off by at most {misses:.3f})")
        print(f"  {deep} layers: {start} + {deep} x {b:.4f} = {total:.2f} {unit}{more}")


def peer(options: argparse.Namespace, folder: Path) -> None:
    """The same small mixture through qtool and llm-compressor, and how far each is from the float model."""
    from pydoc_data.topics import topics

    import torch

    from tests import families, simulate

    tokenizer = families.train_tokenizer(4096)
    model = families.make(
        folder / "model",
        "qwen3_moe",
        tokenizer,
        hidden_size=512,
        moe_intermediate_size=256,
        num_attention_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=4,
        num_key_value_heads=4,
    )
    text = builtin_text(folder, options.samples * options.seq_len)
    size = (str(options.samples), str(options.seq_len))
    python = peer_python()
    runs: dict[str, list[Measured]] = {}
    outputs: dict[str, Path] = {}
    for number in range(options.rounds):
        for scheme in ("w8a8", "w8a8-dynamic"):
            name, output = f"qtool {scheme}", folder / f"{scheme}-{number}"
            command: list[str | Path] = [sys.executable, "-m", "qtool", "quantize", model, "-o", output, "--quiet"]
            command += ["--scheme", scheme, "--calibration", text, "--samples", size[0], "--seq-len", size[1]]
            runs.setdefault(name, []).append(measure([*command, *options.options], PYTHONPATH=str(REPOSITORY)))
            outputs[name] = output
        if python:
            name, output = "llm-compressor SmoothQuant", folder / f"peer-{number}"
            runs.setdefault(name, []).append(measure([python, PEER, model, text, *size, output]))
            outputs[name] = output
    words = "\n\n".join(topics[name] for name in reversed(sorted(topics)))
    ids = torch.tensor(tokenizer(words)["input_ids"][: 32 * 128]).view(32, 128)
    original = simulate.load_float(model)
    reference, routes = simulate.logits(original, ids), simulate.routes(original, ids)
    rows = []
    for name, measured in runs.items():
        found = simulate.load(outputs[name])
        rows.append(
            [
                name,
                spread([run.seconds for run in measured]),
                spread([run.together / 1e6 for run in measured], 0),
                f"{simulate.divergence(simulate.logits(found, ids), reference):.4f}",
                f"{simulate.divergence(simulate.logits(found, ids, routes), reference):.4f}",
            ]
        )
    about = json.loads((model / "config.json").read_text())
    print(
        f"random {about['model_type']}: {about['num_hidden_layers']} layers of {about['num_experts']} experts, hidden "
        f"{about['hidden_size']}; {size[0]} x {size[1]} tokens, {options.rounds} rounds: median (least to most)\n"
    )
    print(table(["command", "seconds", "peak MB: tree", "KL divergence", "the same, routes of the float model"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=giant.SIZES, default="small")
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 2, 4, 8], help="with experts, a run for each number"
    )
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="for --peer")
    parser.add_argument("--folder", type=Path, help="where there is room; default: the system's temporary folder")
    parser.add_argument("options", nargs="*", help="further options of qtool quantize, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        (peer if options.peer else depth)(options, Path(name))


if __name__ == "__main__":
    main()
