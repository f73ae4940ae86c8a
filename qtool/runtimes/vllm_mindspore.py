"""What vLLM-MindSpore 0.5.1 needs to be told besides what vLLM does, and what its failures mean.

It is vLLM with `import vllm_mindspore` before it, and has three kinds of models: its own (native), MindFormers' and
MindOne's. Facts from its source: utils.py (VLLM_MS_MODEL_BACKEND), model_executor/models/registry.py (the native
architectures), model_executor/layers/quantization/golden_stick (native models take W8A8 and FLOAT), scripts.py (the
variables that it sets by itself).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError, in_one_line
from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime, architecture
from qtool.runtimes.vllm import RUNTIME as VLLM
from qtool.scheme import W8A8_DYNAMIC

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes.launch import Launch

NATIVE = (
    "Glm4ForCausalLM",
    "Glm4vForConditionalGeneration",
    "LlamaForCausalLM",
    "MiniCPMForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
# The inference models of mindformers 1.7.0 (models/*/modeling_*.py).
MINDFORMERS = (
    "DeepseekV3ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "TeleChat2ForCausalLM",
)
_VARIABLE = "VLLM_MS_MODEL_BACKEND"

# (what the message says, what is wrong, what to do); the first that matches counts
_CAUSES = (
    (
        r"No module named '?msadapter",
        "vLLM-MindSpore needs msadapter, which is not installed",
        "Install the one that vLLM-MindSpore's installation guide names (PyPI's msadapter 0.1.0 is another package), "
        "or use the container in which both are",
    ),
    (
        r"No module named '?(vllm_mindspore|vllm|mindspore|mindformers|mindone)\b",
        "a package that vLLM-MindSpore needs is not installed: {module}",
        "Install it as vLLM-MindSpore's installation guide says, or use its container",
    ),
    (
        r"version .*(does not|doesn't|not) match|not compatible with .*CANN|CANN version",
        "MindSpore and CANN don't fit together",
        "Install the CANN that this MindSpore was built for; MindSpore's installation guide has the table",
    ),
    (
        r"lib(ascendcl|ge_runner|hccl|runtime|mindspore_ascend)[\w.]*.*cannot open shared object"
        r"|Unsupported device target Ascend",
        "CANN, Ascend's toolkit, is not installed, or its libraries are not found",
        "Run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` first",
    ),
    (
        r"drvGetDevNum|aclrtGetDeviceCount|device count.{0,20}\b0\b|no (available )?(npu|device)|/dev/davinci",
        "no Ascend device is visible",
        "`npu-smi info` lists them; check ASCEND_RT_VISIBLE_DEVICES, and in a container its --device options",
    ),
)


def adapt(launch: Launch, checkpoint: Checkpoint) -> Launch:
    """The launch for one checkpoint: which kind of model.

    Variables that the user has set stay.

    Raises:
        InputError: no kind of model, or not the one that the user chose, runs this checkpoint.
    """
    from qtool.checkpoint.summary import schemes

    dynamic = W8A8_DYNAMIC in schemes(checkpoint).values()
    chosen = os.environ.get(_VARIABLE, "").lower() or backend(checkpoint.config, dynamic=dynamic)
    named = architecture(checkpoint.config)
    if dynamic and (chosen != "mindformers" or named not in MINDFORMERS):
        raise InputError(
            "this checkpoint has layers with dynamic activations (W8A8_DYNAMIC), which vLLM-MindSpore runs through "
            f"MindFormers only, and that not for {named or 'this model'}"
            if named not in MINDFORMERS
            else f"W8A8_DYNAMIC layers need MindFormers' models, but {_VARIABLE} is {chosen}",
            where=str(checkpoint.path),
            hint="Quantize with --scheme w8a8-static.",
        )
    return dataclasses.replace(launch, env={**launch.env, _VARIABLE: chosen})


def backend(config: Mapping[str, Any], *, dynamic: bool) -> str:
    """native, mindformers or mindone, for a model's config.json and whether some layers have dynamic activations.

    Native where it can; MindFormers for what only it has: some architectures, and dynamic activations.
    """
    named = architecture(config)
    if named in NATIVE and not dynamic:
        return "native"
    return "mindformers" if dynamic or named in MINDFORMERS else "mindone"


def explain(error: BaseException) -> InputError | None:
    """What a failure of vLLM-MindSpore means to a user, or None where its own words must do."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {in_one_line(seen)} {seen}"
        for pattern, what, hint in _CAUSES:
            if match := re.search(pattern, text, re.IGNORECASE | re.DOTALL):
                module = match[match.lastindex] if match.lastindex else ""
                return InputError(what.format(module=module), hint=f"{hint}.")
        seen = seen.__cause__ or seen.__context__
    return None


def _dynamic(model: Quantized) -> Limitation | None:
    if not model.dynamic:
        return None
    count, first = len(model.dynamic), model.dynamic[0]
    if model.architecture in MINDFORMERS:
        which = first if count == 1 else f"{first}, ..."
        return Limitation(
            f"{count} layers ({which}) have dynamic activations (W8A8_DYNAMIC), which only the MindFormers models of "
            "vLLM-MindSpore run; its native models take W8A8 and FLOAT"
        )
    return Limitation(
        f"{count} layers have dynamic activations ({first}), which vLLM-MindSpore runs through MindFormers only, and "
        f"that not for {model.architecture or 'this model'}",
        unread=True,
        hint="Quantize the original with --scheme w8a8-static.",
    )


RUNTIME = Runtime(
    name="vllm-mindspore",
    title="vLLM-MindSpore",
    summary="vLLM on Ascend, through MindSpore",
    reads=(
        Reads("float"),
        Reads(
            "golden-stick",
            {"quantization": "golden-stick"},
            (
                Limit(
                    "vllm-mindspore 0.5.1: model_executor/layers/quantization/golden_stick; mindformers 1.7.0: models",
                    _dynamic,
                ),
            ),
        ),
    ),
    hardware=("ascend",),
    plugin_of=VLLM.name,
    worker=VLLM.worker,
    # The plugin's own command line patches vLLM before it runs it.
    server=("vllm_mindspore.scripts", "serve"),
    first=("vllm_mindspore",),
    adapt=adapt,
    explain=explain,
)
