"""From a job to sensitivities: the model opened, the ways to quantize it, the texts, and what it all weighs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qtool import memory
from qtool.calibration.text import Calibration, load
from qtool.calibration.tokenizer import load_tokenizer
from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.engines import plan
from qtool.engines.native.context import Context
from qtool.engines.plan import QuantizationPlan
from qtool.evaluation.text import check_length, windows_of
from qtool.model import selection
from qtool.model.decoder import DecoderStream
from qtool.scheme import W8A8
from qtool.tuning import sensitivity, ways
from qtool.tuning.job import LinearBytes, Measured, Sensitivities, Sensitivity, SensitivityJob
from qtool.tuning.sensitivity import Policies

if TYPE_CHECKING:
    from qtool.model.weights import ModelWeights
    from qtool.workers import Report


@dataclass(frozen=True)
class _Prepared:
    job: SensitivityJob
    context: Context
    plan: QuantizationPlan
    linears: list[str]

    @property
    def model(self) -> DecoderStream:
        return self.context.model

    @property
    def group_size(self) -> int | None:
        """That fits all linears which are quantized."""
        quantized = (name for name, policy in self.plan.policies.items() if policy is not None)
        return ways.group_size(self.model.weights.shape(f"{name}.weight")[-1] for name in quantized)


def measure(job: SensitivityJob, report: Report) -> Sensitivities:
    """Measure every group and linear of a float checkpoint.

    Args:
        report: hears of the progress.

    Raises:
        InputError: a checkpoint that is quantized or can't be run, or too little text.
        QtoolError: the model's hidden states are not finite.
    """
    started = time.perf_counter()
    prepared = _prepare(job)
    text = windows_of(job.text, prepared.model.checkpoint, trust_remote_code=job.trust_remote_code)
    calibration = _calibration(prepared)
    compared = _ways(prepared)
    run = sensitivity.Measurement(prepared.context, compared, job.recipe.calibration.expert_tokens, report)
    return Sensitivities(
        measured=_with_bytes(run.measure(text.ids, calibration.ids), compared, prepared.model.weights),
        bytes=_bytes(prepared),
        total_bytes=plan.output_bytes(prepared.model.weights, prepared.plan.schemes),
        input_bytes=prepared.model.checkpoint.nbytes,
        group_size=prepared.group_size,
        text={"source": text.source, "windows": text.ids.shape[0], "length": text.ids.shape[1]},
        calibration={
            "source": calibration.source,
            "samples": calibration.ids.shape[0],
            "seq_len": calibration.ids.shape[1],
        },
        seconds=round(time.perf_counter() - started, 2),
        peak_memory_bytes=memory.peak(),
    )


def _prepare(job: SensitivityJob) -> _Prepared:
    checkpoint = Checkpoint.open(job.model)
    plan.refuse_quantized(checkpoint)
    stream = DecoderStream(
        checkpoint,
        dtype=torch.float32,
        trust_remote_code=job.trust_remote_code,
        weights=FloatReader(checkpoint, as_float=True),
    )
    check_length(job.text, checkpoint)
    if not stream.is_plain:
        raise stream.unusual("more than hidden states passes from layer to layer, and gradients can't follow that")
    kept = selection.kept_float(stream)
    linears = stream.linears()
    planned = plan.make(checkpoint, job.recipe, job.scheme, job.format, linears, kept, stream.weights)
    linears = [name for name in linears if name not in kept]
    return _Prepared(job, Context(stream, formats.get(job.format)), planned, linears)


def _calibration(prepared: _Prepared) -> Calibration:
    wanted, trust = prepared.job.calibration, prepared.job.trust_remote_code
    tokenizer = load_tokenizer(prepared.model.checkpoint.path, trust_remote_code=trust)
    return load(wanted.data, tokenizer, samples=wanted.samples, seq_len=wanted.seq_len, seed=wanted.seed)


def _ways(prepared: _Prepared) -> dict[str, Policies]:
    """The policies of every linear, by what they are called."""
    planned, job = prepared.plan, prepared.job
    if job.precisions:
        compared = ways.of_precisions(planned.policies, job.precisions, prepared.group_size)
    elif job.modes:
        compared = ways.of_modes(planned.policies, job.modes)
    else:
        return {job.scheme: planned.policies}
    # Runtimes want experts dynamic or static as they are, not one or the other as it suits.
    for name in _experts(prepared.model):
        scheme = planned.schemes[name]
        for policies in compared.values():
            policy = policies[name]
            if policy is not None and scheme is not None and policy.scheme.is_static != scheme.is_static:
                policies[name] = None
    return dict(compared)


def _with_bytes(measured: Measured, compared: Mapping[str, Policies], weights: ModelWeights) -> Measured:
    def sized(each: Sensitivity) -> Sensitivity:
        policies = [(name, compared[each.way][name]) for name in each.linears]
        sizes = [policy.scheme.weights.nbytes(weights.shape(f"{name}.weight")) for name, policy in policies if policy]
        return replace(each, bytes=sum(sizes))

    return Measured([sized(each) for each in measured.groups], [sized(each) for each in measured.linears])


def _experts(model: DecoderStream) -> Iterator[str]:
    for index in range(model.depth):
        if (routed := model.routed(index)) is not None:
            yield from (name for expert in routed.names for name in expert)


def _bytes(prepared: _Prepared) -> dict[str, LinearBytes]:
    weights, schemes, sizes = prepared.model.weights, prepared.plan.schemes, {}
    for name in prepared.linears:
        scheme = schemes[name] or W8A8
        tensor = f"{name}.weight"
        sizes[name] = LinearBytes(weights.nbytes(tensor), scheme.weights.nbytes(weights.shape(tensor)))
    return sizes
