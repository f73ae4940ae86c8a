"""What an engine is asked to do, as it goes to the engine's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quantization; `dataclasses.asdict` makes of it what JSON can say.

    Attributes:
        model: the checkpoint's folder.
        output: the folder to make.
        format: of the output.
        recipe: the validated recipe, as a dict.
        scheme: one of the recipe's.
        calibration: data, samples, seq_len, seed; or instead of data ids ([[int]]), digest and source.
        device: auto, cpu, cuda or npu.
        devices: cards, for golden-stick on Ascend; None for the recipe's.
        overwrite: replace the output if it exists.
        trust_remote_code: allow the checkpoint's own modelling code.
        dry_run: only plan.
        resume: go on where an earlier run of the same job ended (this and what follows: native engine).
        restart: with `resume`, start over where the earlier run was of another job, rather than refuse.
        memory: most bytes that a process may take; None for whatever it takes.
        workers: processes that quantize besides the one that runs the layers; 0 does all in that one.
        ray: address of a Ray cluster whose workers quantize instead, or None.
        threads: of each process; None for the cores. The result depends on it in the last bits.
    """

    model: str
    output: str
    format: str
    recipe: dict[str, Any]
    scheme: str
    calibration: dict[str, Any]
    device: str = "cpu"
    devices: int | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    dry_run: bool = False
    resume: bool = False
    restart: bool = False
    memory: int | None = None
    workers: int = 0
    ray: str | None = None
    threads: int | None = None
