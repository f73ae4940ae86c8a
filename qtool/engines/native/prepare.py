"""From a job to everything that is known before work begins: the model, the plan, what it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.engines import plan
from qtool.engines.job import QuantizationJob
from qtool.engines.native import device, estimate, executor
from qtool.engines.native.context import Context, Setup
from qtool.engines.native.device import DevicePlan
from qtool.engines.native.estimate import ResourceEstimate
from qtool.engines.plan import QuantizationPlan
from qtool.engines.report import DryRun, EstimatedResources
from qtool.errors import InputError
from qtool.model import caches, selection
from qtool.model.decoder import DecoderStream
from qtool.quant.group import uses_importance
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.workers import Report

_CLUSTER = 64  # processes that a cluster may have; how many is known only once it is reached


@dataclass(frozen=True)
class Prepared:
    """A job that can be done.

    Attributes:
        job: as asked for.
        setup: how processes open the model.
        context: how this one has.
        plan: what becomes of which linear.
        estimate: what it will take, and how many tokens go through a layer at a time.
        on_device: how much goes to the device at a time; None in main memory.
        output_bytes: of the output's tensors.
        started: when preparing began, by `time.perf_counter`.
    """

    job: QuantizationJob
    setup: Setup
    context: Context
    plan: QuantizationPlan
    estimate: ResourceEstimate
    on_device: DevicePlan | None
    output_bytes: int
    started: float

    @property
    def cards(self) -> int:
        """How many to compute on."""
        return self.job.devices or 1

    @property
    def model(self) -> DecoderStream:
        return self.context.model

    def dry_run(self) -> DryRun:
        """What would be done. Times some products, which takes a moment."""
        seconds = estimate.seconds(
            self.model, self.plan.policies, self.job.calibration, gradients=self.job.recipe.effort == "high"
        )
        return DryRun(
            layers=plan.summary(self.plan),
            left_float=self.plan.left_float,
            calibration=self.job.calibration.shown(),
            input_bytes=self.model.checkpoint.nbytes,
            output_bytes=self.output_bytes,
            resources=EstimatedResources(
                estimated_seconds=seconds,
                estimated_peak_bytes=self.estimate.memory_bytes,
                scratch_bytes=self.estimate.scratch_bytes,
                batch_tokens=self.estimate.batch_tokens,
            ),
        )


def prepare(job: QuantizationJob, report: Report) -> Prepared:
    """Open the model and plan; nothing is written, and no calibration text is read.

    Sets torch's seed and number of threads.

    Args:
        report: hears of warnings.

    Raises:
        InputError: whatever is wrong with the model, the recipe for it, or the options.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(job.model)
    plan.refuse_quantized(checkpoint)
    setup = _setup(job, checkpoint)
    executor.check(job.resources, job.devices or 1)
    context = setup.of(checkpoint, report.warning)
    linears, kept = context.model.linears(), selection.kept_float(context.model)
    planned = plan.make(
        checkpoint,
        job.recipe,
        job.scheme,
        job.output.format,
        linears,
        kept,
        context.model.weights,
        measures=True,
    )
    context.model.prologue(torch.tensor([[0, 1]]))  # what can't be run shows before any work, and in a dry run
    if job.recipe.effort == "high":
        _refuse_gradients(job, context.model)
        _say_unweighed(job, planned.policies, report)
    if job.recipe.osl == "exact":
        _refuse_unusual(job, context.model)
    if job.recipe.cache is not None:
        _refuse_cacheless(job, context.model)
    for warning in planned.warnings:
        report.warning(warning)
    several = job.devices if (job.devices or 1) > 1 else 0
    needed = estimate.estimate(
        context.model,
        planned.policies,
        job.calibration,
        exact=job.recipe.osl == "exact",
        gradients=job.recipe.effort == "high",
        limit=job.resources.memory,
        processes=job.resources.workers or several or (_CLUSTER if job.resources.ray else 0),
    )
    on_device = _on_device(job, context, planned, needed.batch_tokens, report)
    if on_device is not None:
        setup = replace(setup, elements=on_device.elements)
        context.rows.size = on_device.elements
    return Prepared(
        job=job,
        setup=setup,
        context=context,
        plan=planned,
        estimate=needed,
        on_device=on_device,
        output_bytes=plan.output_bytes(context.model.weights, planned.schemes),
        started=started,
    )


def _setup(job: QuantizationJob, checkpoint: Checkpoint) -> Setup:
    exact = job.recipe.osl == "exact"
    torch.manual_seed(job.calibration.seed)
    torch.set_num_threads(job.resources.threads or torch.get_num_threads())
    chosen = device.choose(job.device, exact=exact)
    device.check_cards(chosen, job.devices)
    device.limit(chosen, job.resources.device_memory)
    return Setup(
        path=str(checkpoint.path),
        dtype=device.compute_dtype(chosen, exact=exact),
        device=chosen,
        trust_remote_code=job.trust_remote_code,
        format=job.output.format,
        threads=torch.get_num_threads(),
        device_memory=job.resources.device_memory,
        cache=job.recipe.cache,
    )


def _on_device(
    job: QuantizationJob, context: Context, planned: QuantizationPlan, batch_tokens: int, report: Report
) -> DevicePlan | None:
    """How the job fits into the device's memory. Says so when it may not."""
    kind = context.model.device.type
    free = device.free_bytes(kind, job.resources.device_memory)
    if free is None:
        return None
    if why := device.reduced_precision():
        report.warning(why)
    found = device.plan(context.model, planned.policies, job.calibration, batch_tokens, free)
    if found.needed > free:
        report.warning(
            f"up to {found.needed / 1e9:.1f} GB of the device's memory may be needed, {free / 1e9:.1f} GB are free; "
            f"what doesn't fit goes there in smaller parts, which takes longer"
        )
    return found


def _refuse_gradients(job: QuantizationJob, model: DecoderStream) -> None:
    where = f"recipe {job.recipe.name}, --effort"
    if job.recipe.osl == "exact":
        what = "osl: exact repeats Golden Stick's search, which knows nothing of effort: high"
        raise InputError(what, where=where, hint="Use one of them.")
    if not model.is_plain:
        raise InputError(
            "effort: high takes gradients from layer to layer, and more than hidden states passes between this model's",
            where=where,
            hint="Use effort: normal.",
        )


def _say_unweighed(job: QuantizationJob, policies: Mapping[str, Policy | None], report: Report) -> None:
    """Says how many linears gain nothing by gradients. Raises InputError where none does."""
    wanted = [policy for policy in policies.values() if policy is not None]
    without = sum(not uses_importance(policy) for policy in wanted)
    what = "effort: high improves smoothing, clipping and GPTQ, and"
    which = f"scheme {job.scheme} of recipe {job.recipe.name}"
    if without == len(wanted):
        raise InputError(
            f"{what} {which} has none of them",
            where="--effort",
            hint="Use --effort normal, or --recipe default, which has all three.",
        )
    if without:
        report.warning(f"{what} {which} has none of them in {without} of {len(wanted)} linears: no gain there")


def _refuse_cacheless(job: QuantizationJob, model: DecoderStream) -> None:
    """Raises InputError where keys and values are not what the cache keeps, or go another way."""
    if job.recipe.osl == "exact":
        raise InputError(
            "osl: exact is Golden Stick's search, which leaves keys and values float",
            where=f"recipe {job.recipe.name}, kv_cache: {job.recipe.kv_cache}",
            hint="use osl: fast",
        )
    for index in range(model.depth):
        if not model.is_idle(index) and (model.attention(index) is None or not model.is_plain):
            raise caches.refuse(model.layer_name(index), str(model.checkpoint.path / "config.json"))


def _refuse_unusual(job: QuantizationJob, model: DecoderStream) -> None:
    if not model.is_plain:
        raise InputError(
            "osl: exact compares hidden states, and more than these passes between the layers of this model",
            where=f"recipe {job.recipe.name}",
            hint="use osl: fast",
        )
    if any(model.routed(index) for index in range(model.depth)):
        raise InputError(
            "osl: exact compares the output of whole layers, which needs all experts at once",
            where=f"recipe {job.recipe.name}",
            hint="use osl: fast for mixtures of experts",
        )
