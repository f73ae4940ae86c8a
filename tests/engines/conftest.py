"""The native engine in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small take longer on two threads, far longer when something else runs as well."""
    import torch

    torch.set_num_threads(1)


class Quiet:
    """Stands in for a worker's report."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        self.steps.append((done, total))

    def warning(self, message: str) -> None:
        self.warnings.append(message)


SAMPLES, LENGTH = 8, 64


@pytest.fixture(scope="session")
def quantize() -> Any:
    """quantize(model, output, scheme="w8a8-dynamic", format="compressed-tensors", recipe="default") -> the report."""

    def run(
        model: Path,
        output: Path,
        scheme: str = "w8a8-dynamic",
        format: str = "compressed-tensors",
        recipe: str = "default",
        **changes: Any,
    ) -> dict[str, Any]:
        from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
        from qtool.engines.native.execute import execute
        from qtool.engines.native.prepare import prepare
        from qtool.recipe.load import load
        from qtool.recipe.schema import Recipe

        report: Any = Quiet()
        job = QuantizationJob(
            model=model,
            output=OutputFolder(output, format),
            recipe=Recipe.model_validate(load(recipe).model_dump(mode="json") | changes),
            scheme=scheme,
            calibration=CalibrationText("builtin", SAMPLES, LENGTH),
            device="cpu",
        )
        return execute(prepare(job, report), report).printed()

    return run
