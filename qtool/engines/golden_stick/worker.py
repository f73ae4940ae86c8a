"""The Golden Stick engine's worker: mindspore-gs quantizes a model and saves it as it saves models.

Runs in an interpreter that has mindspore-gs and neither torch nor pydantic.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qtool import memory
from qtool.engines.golden_stick import config, cpu, mindone
from qtool.engines.golden_stick.tasks import Calibrated, CalibrateTask
from qtool.errors import ForeignError, InputError, QtoolError, foreign, in_one_line

if TYPE_CHECKING:
    from qtool.workers import Report

# mindformers 1.7.0 is the version for MindSpore 2.7.1. It pins transformers 4.51.3, mindone 0.5.0 pins 4.57.1.
_MISSING = (
    "For several cards: make an environment with mindspore-gs 1.4.1 and mindformers 1.7.0 (not beside mindone, which "
    "pins another transformers), and name its interpreter in QTOOL_GOLDEN_STICK_PYTHON"
)
_FULL = ("os error 27", "os error 28", "os error 122", "No space left", "File too large", "Disk quota")


def main(message: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a `CalibrateTask` through MindOne, on one device; answers with `Calibrated`.

    Raises:
        InputError: no such device.
        QtoolError: the disk is full.
    """
    task = CalibrateTask.from_json(message)
    os.chdir(task.scratch)
    report.progress("start MindSpore", 0, 0)
    import mindspore

    device = _device(task.device)
    mindspore.set_device("Ascend" if device == "npu" else "CPU")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    if device == "cpu":
        cpu.provide()
    mindone.register()
    return asdict(calibrate(task, device, report))


def calibrate(task: CalibrateTask, device: str, report: Report) -> Calibrated:
    """Load a model, quantize it and save it.

    Args:
        task: its model is a folder for MindOne, or a YAML file for MindFormers.
    """
    started = time.perf_counter()
    import mindspore

    mindspore.set_seed(task.seed)
    _log_cheaply()
    report.progress("load the model", 0, 0)
    model = _load(task.model)
    gc.freeze()  # mindspore-gs collects garbage after every step: none of it is among what was imported
    through_mindone = os.path.isdir(task.model)
    alphas = _observe(report, through_mindone)
    # What example/deepseekv3/ds_utils.py of Golden Stick sets for OSL; through MindOne it is so by itself.
    settings = {} if through_mindone else {"always_use_fp_input_in_processer": True, "skip_offload_in_processing": True}
    dataset = _dataset(task.ids, through_mindone)
    model.calibrate(config.network(), config.layer_policies(task.policies), dataset, **settings)
    report.progress("save", 0, 0)
    _save(model, task.output)
    return Calibrated(
        device=device,
        versions={name: version(name) for name in ("mindspore", "mindspore_gs", *_frameworks(through_mindone))},
        alphas=alphas,
        peak_memory_bytes=memory.peak(),
        seconds=round(time.perf_counter() - started, 2),
    )


def _load(pretrained: str) -> Any:
    from mindspore_gs.ptq.models.auto_model import AutoQuantForCausalLM

    try:
        with foreign("mindspore-gs can't load this model", where=pretrained):
            return AutoQuantForCausalLM.from_pretrained(pretrained)
    except ForeignError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        what = f"mindspore-gs can't import what it needs: {in_one_line(error.__cause__)}"
        raise InputError(what, where=sys.executable, hint=_MISSING) from error


def _save(model: Any, output: str) -> None:
    try:
        model.save_quantized(output)
    except Exception as error:
        if any(sign in str(error) for sign in _FULL):
            raise QtoolError(
                f"no space left: {in_one_line(error)}",
                where=output,
                hint="Free some space or choose another --output; nothing was left behind.",
            ) from error
        raise


def _frameworks(through_mindone: bool) -> tuple[str]:
    return ("mindone",) if through_mindone else ("mindformers",)


def _device(wanted: str) -> str:
    from mindspore import hal

    usable = hal.is_available("Ascend")
    if wanted == "auto":
        return "npu" if usable else "cpu"
    if wanted == "cuda" or (wanted == "npu" and not usable):
        raise InputError(f"MindSpore can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def _dataset(ids: list[list[int]], through_mindone: bool) -> Any:
    """One sample after the other, [1, tokens]: MindOne's `generate` takes tensors, MindFormers' takes arrays."""
    import datasets
    import numpy as np
    from mindspore import Tensor, int32, ops

    def tensors(rows: dict[str, Any]) -> dict[str, Any]:
        samples = [Tensor([row], int32) for row in rows["input_ids"]]
        return {"input_ids": samples, "attention_mask": [ops.ones_like(sample) for sample in samples]}

    def arrays(rows: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [np.array([row], np.int32) for row in rows["input_ids"]]}

    dataset = datasets.Dataset.from_dict({"input_ids": ids})
    dataset.set_transform(tensors if through_mindone else arrays)
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


def _observe(report: Report, through_mindone: bool) -> dict[str, float]:
    """Report progress and collect the alphas as mindspore-gs finds them (MindOne's only); both only look on."""
    from mindspore_gs.ptq.algo_modules.algo_module import AlgoModule
    from mindspore_gs.ptq.ptq.quant import PTQ

    alphas = _collect_alphas() if through_mindone else {}
    decoder_layers = PTQ._get_decoder_layers
    total = done = 0

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

    PTQ._get_decoder_layers = walked
    PTQ.pipeline.insert(0, Progress)
    return alphas


def _collect_alphas() -> dict[str, float]:
    from mindspore_gs.ptq.algo_modules.mindone.anti_outliers import OSLSmoother

    alphas: dict[str, float] = {}
    search = OSLSmoother._search_best_ratio

    def searched(self: Any, name: str, layer: Any, info: Any, *args: Any) -> Any:
        scale, ratio = search(self, name, layer, info, *args)
        alphas[info.curr_layer[0].layer_name.removeprefix("network.")] = ratio
        return scale, ratio

    OSLSmoother._search_best_ratio = searched
    return alphas
