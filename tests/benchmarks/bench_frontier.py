"""The recipes that `qtool tune --runtime` finds for several sizes, against uniform schemes of about these sizes.

usage: bench_frontier.py [--model DIR] [--calibration FILE] [--text FILE] [--runtime NAME] [--sizes MB,...]
           [--effort EFFORT] [--keep DIR]

The sensitivities are measured once; with --keep, those that lie in the folder are taken. Each recipe is quantized and
evaluated as `qtool quantize` and `qtool eval` do; so is each uniform scheme. KL divergences are those of `qtool eval`,
in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import OutputFolder, QuantizationJob
from qtool.evaluation import job as evaluation
from qtool.evaluation.job import ComparisonJob
from qtool.jobs import quantize
from qtool.jobs.quantize import with_scheme
from qtool.recipe.load import load
from qtool.tuning.job import Sensitivities
from qtool.tuning.tune import SCHEME, Goal, TuningJob, propose, sensitivities
from qtool.tuning.wanted import Wanted, start
from tests.benchmarks._common import DEFAULT_MODEL, table

UNIFORM = ("w4a16-g64", "w8a8-dynamic", "w8a8")


def silent(event: Any) -> None: ...


def measure(job: TuningJob, recipe: Any, scheme: str, output: Path) -> tuple[int, float]:
    """(bytes of the tensors, KL divergence)."""
    wanted = QuantizationJob(
        model=job.model,
        output=OutputFolder(output, job.format),
        recipe=recipe,
        scheme=scheme,
        calibration=job.calibration,
    )
    quantize.run("native", wanted, silent)
    (found,) = evaluation.run(ComparisonJob(base=job.model, quantized=(output,), text=job.text), silent)
    return Checkpoint.open(output).nbytes, found.figures.kl_divergence["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--runtime", default="vllm")
    parser.add_argument("--sizes", default="125,135,150", help="in MB")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--uniform", nargs="*", default=UNIFORM)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--keep", type=Path, help="a folder for the recipes, the sensitivities and the models")
    args = parser.parse_args()
    wanted = Wanted(
        text=args.text,
        windows=args.windows,
        length=512,
        calibration=args.calibration,
        samples=32,
        seq_len=512,
        runtime=args.runtime,
    )
    begun = start(args.model, wanted)
    text, calibration = wanted.texts(begun.recipe)
    job = TuningJob(
        model=begun.model,
        recipe=begun.recipe,
        scheme=begun.scheme,
        extends=begun.extends,
        format=begun.format,
        precisions=begun.precisions,
        goal=Goal(max_size="1GB"),
        text=text,
        calibration=calibration,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if (file := folder / "sensitivities.json").exists():
            found = Sensitivities.from_json(json.loads(file.read_text()))
        else:
            found = sensitivities(job, [], silent)
            file.write_text(json.dumps(found.to_json()))
        rows: list[list[str]] = []

        def show(*row: str) -> None:
            rows.append([*row])
            print(*row, flush=True)

        for scheme in args.uniform:
            nbytes, kl = measure(job, *with_scheme(begun.recipe, scheme), folder / scheme)
            show(scheme, f"{nbytes / 1e6:.1f}", f"{kl:.5f}", "")
        for size in args.sizes.split(","):
            proposed = propose(replace(job, goal=Goal(max_size=f"{size}MB")), found)
            (folder / f"{size}.yaml").write_text(proposed.recipe)
            recipe = load(str(folder / f"{size}.yaml")).model_copy(update={"effort": args.effort})
            nbytes, kl = measure(job, recipe, SCHEME, folder / f"tuned-{size}-{args.effort}")
            show(f"tuned, at most {size} MB", f"{nbytes / 1e6:.1f}", f"{kl:.5f}", f"{proposed.predicted_kl:.5f}")
        print(table(["", "MB", "KL divergence", "as estimated"], rows))


if __name__ == "__main__":
    main()
