"""From a prepared job to a checkpoint, never holding more of the model than one layer."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from qtool import memory, transfers
from qtool.calibration import pictures
from qtool.calibration.text import Calibration, load
from qtool.calibration.tokenizer import load_tokenizer
from qtool.checkpoint.storage import resumable_bytes
from qtool.checkpoint.writer import CheckpointWriter, Resume, Sharding
from qtool.engines.native import executor
from qtool.engines.native.ledger import Ledger
from qtool.engines.native.pieces import PieceWriter
from qtool.engines.native.prepare import Prepared
from qtool.engines.native.schedule import Schedule
from qtool.engines.report import CalibrationUsed, QuantizationReport, QuantizationResult
from qtool.errors import InputError
from qtool.files import check_free_space
from qtool.transfers import Behind
from qtool.version import __version__

if TYPE_CHECKING:
    from qtool.workers import Report


def execute(prepared: Prepared, report: Report) -> QuantizationResult:
    """Quantize.

    Args:
        report: hears of the progress.

    Raises:
        InputError: too little calibration text, an output that must not be written, damaged weights.
        QtoolError: the disk is full or fails, or processes were lost; what is finished is kept.
    """
    job, model = prepared.job, prepared.model
    calibration = checked(prepared)
    if calibration.inputs:
        model.show(calibration.inputs, calibration.ids.shape[1])
    writer = _writer(prepared, calibration)
    workers = executor.make(job.resources, prepared.context, prepared.setup, cards=prepared.cards)
    with writer, workers as units, Behind(threads=int(transfers.asynchronous(model.device))) as writing:
        output, ledger = PieceWriter(writer, model, prepared.context.format, writing), Ledger(writer)
        output.write_outside()  # first, so that damage in it shows at once
        Schedule(prepared, output, ledger, units, report).run(calibration.ids)
        made = _report(prepared, calibration, ledger)
        path = writer.finish(model.checkpoint, model.checkpoint.config, made.to_json())
    return QuantizationResult(
        report=made,
        output=path,
        input_bytes=model.checkpoint.nbytes,
        output_bytes=prepared.output_bytes,
        seconds=round(time.perf_counter() - prepared.started, 2),
        peak_memory_bytes=memory.peak(),
    )


def checked(prepared: Prepared) -> Calibration:
    """The calibration samples, once it is known that the disk has room: what a dry run looks at too.

    Raises:
        InputError: too little text, or none that can be read. QtoolError: the disk is too full.
    """
    output = prepared.job.output
    there = resumable_bytes(output.path) if output.resume else 0
    check_free_space(output.path, prepared.output_bytes + prepared.estimate.scratch_bytes - there)
    return _calibration(prepared)


def _calibration(prepared: Prepared) -> Calibration:
    wanted = prepared.job.calibration
    if wanted.tokens is not None:
        return Calibration(torch.tensor(wanted.tokens.ids), wanted.tokens.digest, wanted.tokens.source)
    folder, trust = prepared.model.checkpoint.path, prepared.job.trust_remote_code
    if pictures.has_pictures(wanted.data):
        if prepared.job.recipe.osl == "exact":
            raise InputError("osl: exact takes text alone", where=wanted.data, hint="use osl: fast for pictures")
        return pictures.load(
            wanted.data, folder, samples=wanted.samples, seq_len=wanted.seq_len, trust_remote_code=trust
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    return load(wanted.data, tokenizer, samples=wanted.samples, seq_len=wanted.seq_len, seed=wanted.seed)


def _writer(prepared: Prepared, calibration: Calibration) -> CheckpointWriter:
    output = prepared.job.output
    return CheckpointWriter(
        output.path,
        prepared.context.format,
        overwrite=output.overwrite,
        sharding=Sharding(int(prepared.job.recipe.export.max_shard_gb * 1e9), 6 * len(prepared.model.checkpoint.names)),
        resume=Resume(_key(prepared, calibration), output.resume, output.restart),
    )


def _key(prepared: Prepared, calibration: Calibration) -> str:
    """Equal for two jobs only when one can go on where the other ended."""
    checkpoint, recipe, setup = prepared.model.checkpoint, prepared.job.recipe, prepared.setup
    files = sorted({checkpoint.info(name).file for name in checkpoint.names})
    parts = {
        "qtool": __version__,
        "versions": _versions(),
        "setup": setup.decisive,
        "config": checkpoint.config,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "policies": [policy.model_dump(mode="json") for policy in recipe.schemes[prepared.job.scheme]],
        "osl": recipe.osl,
        "effort": recipe.effort,
        "expert_tokens": recipe.calibration.expert_tokens,
        "max_shard_gb": recipe.export.max_shard_gb,
        "calibration": calibration.digest,
        "tokens": list(calibration.ids.shape),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _report(prepared: Prepared, calibration: Calibration, ledger: Ledger) -> QuantizationReport:
    job, checkpoint = prepared.job, prepared.model.checkpoint
    return QuantizationReport(
        versions=_versions(),
        engine="native",
        device=str(prepared.model.device),
        threads=prepared.setup.threads,
        source=job.model.name,
        origin=checkpoint.origin,
        format=job.output.format,
        recipe=job.recipe.model_dump(mode="json"),
        scheme=job.scheme,
        calibration=CalibrationUsed(
            source=calibration.source,
            sha256=calibration.digest,
            samples=calibration.ids.shape[0],
            seq_len=calibration.ids.shape[1],
        ),
        layers=ledger.groups,
        experts=ledger.experts,
        left_float=prepared.plan.left_float,
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
