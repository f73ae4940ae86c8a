"""Count what quantizing one decoder layer asks of a device, without having one: kernels, copies, waits.

    python -m tests.device.counts llama-3-8b --samples 8 --json counts.json

The layer has its real shape; its numbers mean nothing, since large matrix products and factorizations are left out, so
that a machine without a device gets through in a minute. What is asked for is the same. Two runs with different numbers
of samples tell what a batch of tokens costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device import models
from tests.engines.accelerator import Accelerator, Counts

_LARGE = 1 << 28  # multiplications of a product that is left out


class Shapes(Accelerator):
    """Leaves out what takes a processor long, and gives numbers that nothing stumbles over in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.in_graphs: dict[str, int] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if name == "linalg_cholesky_ex":
            self.flops += len(args[0]) ** 3 // 3
            return args[0].clone(), torch.zeros((), dtype=torch.int32)
        if name == "linalg_solve_triangular":
            self.flops += len(args[0]) ** 3
            return kwargs.get("out", args[1])
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            products = a.shape[0] * a.shape[1] * b.shape[1]
            self.flops += 2 * products
            if products > _LARGE:
                return args[0] if name == "addmm_" else torch.full((a.shape[0], b.shape[1]), 0.01, dtype=a.dtype)
        return func(*args, **kwargs)


class _Graph:
    """Stands in for `quant.rounding.graphs.Captured`: its operations are one launch."""

    def __init__(self, device: Shapes, function: Callable[..., tuple[torch.Tensor, ...]], examples: Any) -> None:
        self._device, self._function = device, function
        self._shape, self._name = examples[0].shape, getattr(function, "func", function).__name__
        self._results: tuple[torch.Tensor, ...] | None = None
        device.counts.kernels["capture of a graph"] += 1

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if arguments[0].shape != self._shape:
            return self._function(*arguments)
        self._device.counts.kernels["copy_ into a graph"] += len(arguments)
        self._device.counts.kernels["launch of a graph"] += 1
        if self._results is None:
            kept, self._device.counts = self._device.counts, Counts()
            self._results = self._function(*arguments)
            self._device.in_graphs[self._name] = self._device.counts.kernels.total()
            self._device.counts = kept
        return self._results


@contextmanager
def imitated() -> Iterator[Shapes]:
    """Within the block the native engine takes a device that counts."""
    from qtool.engines.native import device
    from qtool.quant.rounding import graphs

    with pytest.MonkeyPatch.context() as patch, Shapes() as shapes:
        patch.setattr(device, "choose", lambda _wanted, exact: "cuda")
        graphs.forget()
        patch.setattr(graphs, "usable", lambda _device: True)
        patch.setattr(graphs, "Captured", lambda function, examples: _Graph(shapes, function, examples))
        yield shapes


def count(shape: str, folder: Path, samples: int, length: int, *, small: bool = False) -> dict[str, Any]:
    """Of one layer of `models.SHAPES`, with its output: from its begin to the end of the job."""
    from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob, Resources
    from qtool.engines.native.execute import execute
    from qtool.engines.native.prepare import prepare
    from qtool.recipe.load import load
    from qtool.recipe.schema import Recipe

    source, text = folder / shape, folder / f"{samples}x{length}.txt"
    if not source.exists():
        models.layers(source, shape, count=1, small=small)
    models.text(text, samples * length)
    options = models.SHAPES[shape].options
    recipe: Recipe = load(options[1] if options else "default")
    output = OutputFolder(folder / f"{shape}-{samples}", "compressed-tensors")
    calibration = CalibrationText(str(text), samples, length)
    with imitated() as device:

        class Beginning:
            """Forgets what was counted before the layer."""

            def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
                if not done:
                    device.counts, device.flops = Counts(), 0

            def warning(self, message: str) -> None:
                print(message)

        report: Any = Beginning()
        job = QuantizationJob(
            model=source,
            output=output,
            recipe=recipe,
            scheme=recipe.default_scheme,
            calibration=calibration,
            device="cuda",
            resources=Resources(threads=torch.get_num_threads()),
        )
        execute(prepare(job, report), report)
        found = device.counts
        return {
            "shape": shape,
            "samples": samples,
            "seq_len": length,
            "kernels": found.kernels.total(),
            "uploads": len(found.uploads),
            "uploaded_bytes": sum(found.uploads),
            "downloads": len(found.downloads),
            "downloaded_bytes": sum(found.downloads),
            "waits": found.waits.total(),
            "kernels_of_a_graph": device.in_graphs,
            "flops": device.flops,
            "peak_device_bytes": device.peak,
            "by_kernel": dict(found.kernels.most_common(25)),
            "by_wait": dict(found.waits.most_common()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*models.SHAPES])
    parser.add_argument("--samples", type=int, action="append", help="of 512 tokens; may be given twice")
    parser.add_argument("--small", action="store_true", help="a sixteenth of the width")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qtool-counts-") as name:
        found = [count(options.shape, Path(name), each, 512, small=options.small) for each in options.samples or [4]]
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
