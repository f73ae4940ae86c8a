"""The Golden Stick engine's worker: mindspore-gs quantizes a model and saves it as it saves models.

Runs in an interpreter that has mindspore-gs and neither torch nor pydantic.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qtool.engines.golden_stick import config, cpu, mindone
from qtool.errors import InputError, QtoolError, in_one_line

if TYPE_CHECKING:
    from qtool.workers import Report

_FULL = ("os error 27", "os error 28", "os error 122", "No space left", "File too large", "Disk quota")


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize a model through MindOne.

    Job keys: model (a folder that MindOne can load), policies (a recipe's scheme), ids ([[int]]), output (a folder
    to make), scratch (a folder for whatever the libraries drop in the current one), device (auto, cpu or npu),
    seed.

    Returns:
        device, versions, alphas (first linear of each OSL group → alpha), peak_memory_bytes, seconds.

    Raises:
        InputError: no such device.
        QtoolError: the disk is full.
    """
    started = time.perf_counter()
    os.chdir(job["scratch"])
    report.progress("start MindSpore", 0, 0)
    import mindspore

    device = _device(job["device"])
    mindspore.set_device("Ascend" if device == "npu" else "CPU")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    mindspore.set_seed(job["seed"])
    from mindspore_gs.ptq.models.auto_model import AutoQuantForCausalLM

    _log_cheaply()
    if device == "cpu":
        cpu.provide()
    mindone.register()
    report.progress("load the model", 0, 0)
    model = AutoQuantForCausalLM.from_pretrained(job["model"])
    gc.freeze()  # mindspore-gs collects garbage after every step: none of it is among what was imported
    alphas = _observe(report)
    model.calibrate(config.network(), config.layer_policies(job["policies"]), _dataset(job["ids"]))
    report.progress("save", 0, 0)
    try:
        model.save_quantized(job["output"])
    except Exception as error:
        if any(sign in str(error) for sign in _FULL):
            raise QtoolError(
                f"no space left: {in_one_line(error)}",
                where=job["output"],
                hint="Free some space or choose another --output; nothing was left behind.",
            ) from error
        raise
    return {
        "device": device,
        "versions": {name: version(name) for name in ("mindspore", "mindspore_gs", "mindone")},
        "alphas": alphas,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _device(wanted: str) -> str:
    from mindspore import hal

    usable = hal.is_available("Ascend")
    if wanted == "auto":
        return "npu" if usable else "cpu"
    if wanted == "cuda" or (wanted == "npu" and not usable):
        raise InputError(f"MindSpore can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def _dataset(ids: list[list[int]]) -> Any:
    """One sample after the other, as [1, tokens] tensors."""
    import datasets
    from mindspore import Tensor, int32, ops

    def tensors(rows: dict[str, Any]) -> dict[str, Any]:
        samples = [Tensor([row], int32) for row in rows["input_ids"]]
        return {"input_ids": samples, "attention_mask": [ops.ones_like(sample) for sample in samples]}

    dataset = datasets.Dataset.from_dict({"input_ids": ids})
    dataset.set_transform(tensors)
    return dataset


def _log_cheaply() -> None:
    """Give mindspore-gs's logger the place of a message without reading every source file on the call stack.

    It does so for each message, also for those below its level, of which a layer has 500: two thirds of the time
    that a small model takes.
    """
    module = importlib.import_module("mindspore_gs.common.logger")

    def caller() -> tuple[str, int, str, None]:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename == module.__file__:
            frame = frame.f_back
        return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None

    module._find_real_caller = caller  # type: ignore[attr-defined]


def _observe(report: Report) -> dict[str, float]:
    """Report progress and collect the alphas as mindspore-gs finds them; both only look on."""
    from mindspore_gs.ptq.algo_modules.algo_module import AlgoModule
    from mindspore_gs.ptq.algo_modules.mindone.anti_outliers import OSLSmoother
    from mindspore_gs.ptq.ptq.quant import PTQ

    alphas: dict[str, float] = {}
    search, decoder_layers = OSLSmoother._search_best_ratio, PTQ._get_decoder_layers
    total = done = 0

    def searched(self: Any, name: str, layer: Any, info: Any, *args: Any) -> Any:
        scale, ratio = search(self, name, layer, info, *args)
        alphas[info.curr_layer[0].layer_name.removeprefix("network.")] = ratio
        return scale, ratio

    def walked(self: Any, network: Any) -> None:
        nonlocal total
        decoder_layers(self, network)
        total = len(self.decoder_layers)

    class Progress(AlgoModule):
        """First in the pipeline that every decoder layer goes through."""

        def replace(self, *args: Any, **kwargs: Any) -> None:
            pass

        def process(self, *args: Any, **kwargs: Any) -> None:
            nonlocal done
            report.progress("quantize", done, total, "layers")
            done += 1

    OSLSmoother._search_best_ratio, PTQ._get_decoder_layers = searched, walked
    PTQ.pipeline.insert(0, Progress)
    return alphas
