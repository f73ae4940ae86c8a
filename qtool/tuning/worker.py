"""The worker process that measures sensitivities."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure every group and linear of a float checkpoint.

    Job keys: model, recipe (validated, as a dict), scheme, format, modes (further ways: the scheme with each of these
    activations everywhere; none: the scheme as it is), text, windows, length, calibration ({"data", "samples",
    "seq_len", "seed"}), trust_remote_code.

    Returns:
        groups and linears (lists of `Sensitivity`), bytes ({linear: [float, quantized]}), total_bytes (of the whole
        checkpoint under the scheme), input_bytes, text, calibration, seconds, peak_memory_bytes.
    """
    hide_media_packages()
    import torch

    from qtool import memory
    from qtool.calibration.text import load, load_tokenizer
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.engines.native import plan
    from qtool.evaluate.comparison import check_length, windows_of
    from qtool.model.decoder import DecoderStream
    from qtool.recipe.schema import Recipe
    from qtool.scheme import W8A8
    from qtool.tuning.search import with_mode
    from qtool.tuning.sensitivity import measure

    started = time.perf_counter()
    checkpoint = Checkpoint.open(job["model"])
    plan.refuse_quantized(checkpoint)
    trust: bool = job["trust_remote_code"]
    recipe = Recipe.model_validate(job["recipe"])
    stream = DecoderStream(checkpoint, dtype=torch.float32, trust_remote_code=trust)
    check_length(stream, job["length"])
    names = stream.linears()
    planned = plan.make(checkpoint, recipe, job["scheme"], job["format"], names)
    modes: list[str] = job["modes"]
    ways = {mode: with_mode(planned.policies, mode) for mode in modes} or {job["scheme"]: planned.policies}
    if modes:  # runtimes want experts dynamic or static as they are, not one or the other as it suits
        routed = [stream.routed(i) for i in range(stream.depth)]
        for name in (name for module in routed if module for expert in module.names for name in expert):
            for mode, policies in ways.items():
                if (scheme := planned.schemes[name]) is not None and scheme.is_static != (mode == "static"):
                    policies[name] = None
    text = windows_of(job, checkpoint)
    wanted = job["calibration"]
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust)
    calibration = load(
        wanted["data"], tokenizer, samples=wanted["samples"], seq_len=wanted["seq_len"], seed=wanted["seed"]
    )
    dtype = stream.weights.dtype(next(f"{name}.weight" for name, policy in planned.policies.items() if policy))
    enough = recipe.calibration.expert_tokens
    output_format = formats.get(job["format"])
    groups, linears = measure(stream, text.ids, calibration.ids, ways, output_format, dtype, enough, report)
    quantized = plan.output_bytes(stream.weights, planned.schemes)
    sizes = {}
    for name in names:
        policy = planned.policies[name]
        weights = W8A8.weights if policy is None else policy.scheme.weights
        info = checkpoint.info(f"{name}.weight")
        sizes[name] = [stream.weights.nbytes(f"{name}.weight"), weights.nbytes(info.shape)]
    return {
        "groups": [asdict(group) for group in groups],
        "linears": [asdict(linear) for linear in linears],
        "bytes": sizes,
        "total_bytes": quantized,
        "input_bytes": checkpoint.nbytes,
        "text": {"source": text.source, "windows": text.ids.shape[0], "length": text.ids.shape[1]},
        "calibration": {
            "source": calibration.source,
            "samples": calibration.ids.shape[0],
            "seq_len": calibration.ids.shape[1],
        },
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": memory.peak(),
    }
