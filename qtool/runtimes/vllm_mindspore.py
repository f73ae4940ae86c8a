"""What vLLM-MindSpore 0.5.1 needs to be told besides what vLLM does, and what its failures mean.

It is vLLM with `import vllm_mindspore` before it, and has three kinds of models: its own (native), MindFormers' and
MindOne's. Left alone it takes MindFormers' where there is one. Facts from its source: utils.py (VLLM_MS_MODEL_BACKEND),
model_executor/models/registry.py (the native architectures), model_executor/model_loader/utils.py (which kind comes
first), model_executor/layers/quantization/golden_stick (native models take W8A8 and FLOAT), scripts.py (the variables
that it sets by itself).
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
# Those of them that ask how their layers are quantized (get_quant_config); the others put int8 into float parameters.
ASKING = ("DeepseekV3ForCausalLM", "Qwen3ForCausalLM", "TeleChat2ForCausalLM")
# Of this model MindFormers doesn't find a matrix, key_value, quantized or not; its place keeps what it was made with.
UNFOUND = "TeleChat2ForCausalLM"
# Those of them that load `weight_scale` into what holds it there, `w_scale` (convert_name).
DYNAMIC = ("DeepseekV3ForCausalLM",)
# Native models with experts, which assert a method that neither W8A8 nor FLOAT is.
EXPERTS = ("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration")
_FORMAT = "golden-stick"
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

    model = Quantized(checkpoint.config, schemes(checkpoint))
    chosen = os.environ.get(_VARIABLE, "").lower()
    if not _any(model):
        return dataclasses.replace(launch, env={**launch.env, _VARIABLE: chosen or backend(checkpoint.config)})
    kinds = reading(model.architecture, dynamic=bool(model.dynamic))
    if chosen and chosen not in kinds:
        raise InputError(
            f"{_VARIABLE} is {chosen}, whose models don't read this checkpoint; those of {' and '.join(kinds)} do",
            where=str(checkpoint.path),
            hint=f"Unset {_VARIABLE}.",
        )
    kind = chosen or kinds[0]
    if kind == "mindformers" and model.architecture == "DeepseekV3ForCausalLM":
        _check_final_norm(checkpoint)
    return dataclasses.replace(launch, env={**launch.env, _VARIABLE: kind})


def _check_final_norm(checkpoint: Checkpoint) -> None:
    """Raises InputError where MindFormers would take another layer's norm for the model's last.

    MindFormers 1.7.0 (models/deepseek3/utils.py, weight_mapping) loads shared_head.norm of layer 61, which predicts one
    token further, into the same parameter as model.norm: what comes last stays. Files come as os.listdir has them
    (get_weights_files), and a file's tensors in the order of their names (safetensors, keys).
    """
    further, last = "model.layers.61.shared_head.norm.weight", "model.norm.weight"
    if further not in checkpoint or last not in checkpoint:
        return
    order = [name for name in os.listdir(checkpoint.path) if name.endswith(".safetensors")]
    first, second = (order.index(checkpoint.info(name).file.name) for name in (further, last))
    if first > second:
        raise InputError(
            f"MindFormers would load {further} in place of {last}: of the files with them, this folder lists "
            f"{order[second]} first",
            where=str(checkpoint.path),
            hint="Copy the folder, which changes the order of its files, or serve it with vllm-ascend: qtool convert "
            "--to modelslim.",
        )


def backend(config: Mapping[str, Any]) -> str:
    """native, mindformers or mindone, for a float model's config.json: the first of them that has its architecture."""
    named = architecture(config)
    return "native" if named in NATIVE else "mindformers" if named in MINDFORMERS else "mindone"


def reading(named: str, *, dynamic: bool) -> list[str]:
    """Which kinds of models read a golden-stick checkpoint of the architecture `named`, the preferred one first.

    `dynamic` says whether some of its layers have dynamic activations. MindOne's never do.
    """
    native = named in NATIVE and named not in EXPERTS and not dynamic
    mindformers = named in (DYNAMIC if dynamic else ASKING) and named != UNFOUND
    return ["native"] * native + ["mindformers"] * mindformers


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


def _any(model: Quantized) -> list[str]:
    """Its quantized layers."""
    return [name for name, scheme in model.schemes.items() if scheme is not None]


def _unread(model: Quantized) -> bool:
    return bool(_any(model)) and not reading(model.architecture, dynamic=bool(model.dynamic))


def _instead(model: Quantized) -> str:
    static = "Quantize the original with --scheme w8a8-static, or" if reading(model.architecture, dynamic=False) else ""
    other = "with --format compressed-tensors, for vLLM, or modelslim, for vllm-ascend."
    return f"{static or 'Quantize the original'} {other}"


def _which(names: list[str]) -> str:
    return f"{len(names)} layers ({names[0]}, ...)" if len(names) > 1 else f"1 layer ({names[0]})"


def _unasked(model: Quantized) -> Limitation | None:
    named = model.architecture
    if not _unread(model) or named not in MINDFORMERS or named in ASKING:
        return None
    return Limitation(
        f"{_which(_any(model))} would be quantized, but vLLM-MindSpore runs {named} through MindFormers, whose model "
        "ignores the quantization: it would use the integers as float weights, and generate noise",
        fatal=True,
        hint=_instead(model),
    )


def _unfound(model: Quantized) -> Limitation | None:
    if model.architecture != UNFOUND:
        return None
    return Limitation(
        f"vLLM-MindSpore runs {UNFOUND} through MindFormers, which doesn't load its key_value: it would generate noise",
        fatal=True,
        hint="vLLM reads it: quantize the original with --scheme w8a8-dynamic --format compressed-tensors.",
    )


def _unnormed(model: Quantized) -> Limitation | None:
    if model.architecture != "Glm4MoeForCausalLM" or not model.config.get("use_qk_norm") or _any(model):
        return None
    return Limitation(
        "vLLM-MindSpore runs Glm4MoeForCausalLM through MindFormers, which doesn't load q_norm and k_norm, and this "
        "model has them (use_qk_norm): it would generate noise",
        fatal=True,
        hint="Use --runtime vllm-ascend or vllm.",
    )


def _unscaled(model: Quantized) -> Limitation | None:
    named = model.architecture
    if not _unread(model) or named not in ASKING or named == UNFOUND:
        return None
    return Limitation(
        f"{_which(model.dynamic)} would have dynamic activations (W8A8_DYNAMIC), but vLLM-MindSpore runs those "
        f"only through MindFormers, whose {named} doesn't load their scales: it would generate noise",
        fatal=True,
        hint=_instead(model),
    )


def _unsupported(model: Quantized) -> Limitation | None:
    named = model.architecture
    if not _unread(model) or named in MINDFORMERS:
        return None
    if named in NATIVE and named not in EXPERTS:
        text = (
            f"{_which(model.dynamic)} have dynamic activations, which vLLM-MindSpore runs only through MindFormers; "
            f"MindFormers doesn't support them for {named}"
        )
    else:
        text = f"{_which(_any(model))} are quantized, which vLLM-MindSpore doesn't load for {named or 'this model'}"
    return Limitation(text, unread=True, hint=_instead(model))


def _four_bits(model: Quantized) -> Limitation | None:
    found = [
        name
        for name, scheme in model.schemes.items()
        if scheme is not None and scheme.weights.num_bits == 4 and ".experts." not in name
    ]
    if not found:
        return None
    return Limitation(
        f"{_which(found)} would have int4 weights, which MindFormers has for routed experts alone",
        fatal=True,
        hint="Give int4 to routed experts alone, as the recipe deepseek-r1-a8w4 does, or use --format modelslim.",
    )


def _native(model: Quantized) -> Limitation | None:
    named = model.architecture
    if not _any(model) or _unread(model) or named not in MINDFORMERS or named in ASKING:
        return None
    return Limitation(
        f"vLLM-MindSpore reads this only with {_VARIABLE}=native, which qtool sets; without it, it runs MindFormers' "
        f"{named}, which ignores the quantization"
    )


_MINDFORMERS = "mindformers 1.7.0: models"
_PLUGIN = "vllm-mindspore 0.5.1: model_executor"
_UNFOUND = Limit(
    "MindFormers has no name for key_value: it is skipped, and what it belongs to keeps its initial values",
    f"{_MINDFORMERS}/telechat2/utils.py (weight_mapping), parallel_core/inference/base_models/gpt/gpt_model.py "
    "(load_weights, load_default_param)",
    _unfound,
)
_UNNORMED = Limit(
    "MindFormers has no name for q_norm and k_norm: they are skipped",
    f"{_MINDFORMERS}/glm4_moe/utils.py (weight_mapping), parallel_core/inference/base_models/gpt/gpt_model.py",
    _unnormed,
)
_LIMITS = (
    _UNFOUND,
    Limit(
        "MindFormers' model ignores the quantization: it loads int8 weights into float parameters",
        f"{_MINDFORMERS}/{{qwen2,qwen3_moe,glm4,glm4_moe}}/modeling_*_infer.py (no get_quant_config; GPTModel without "
        f"quant_config); {_PLUGIN}/model_loader/utils.py (MindFormers first), models/registry.py, "
        "layers/quantization/golden_stick/golden_stick.py (native: W8A8 and FLOAT), layers/fused_moe/layer.py (native "
        "experts: assert isinstance(quant_method, FusedMoEMethodBase))",
        _unasked,
    ),
    Limit(
        "MindFormers names the scale w_scale, but this model doesn't rename weight_scale; tensors without a parameter "
        "are skipped, so the scales keep their initial values",
        "mindformers 1.7.0: parallel_core/inference/quantization/golden_stick/a8dynw8.py (w_scale), "
        "parallel_core/inference/base_models/gpt/gpt_model.py (load_weights, load_default_param), "
        "models/qwen3/utils.py (no such name; "
        "models/deepseek3/modeling_deepseek_v3_infer.py has it)",
        _unscaled,
    ),
    Limit(
        "native models refuse W8A8_DYNAMIC and all quantized experts; MindOne's models load no integers",
        f"{_PLUGIN}/layers/quantization/golden_stick/golden_stick.py (quantization_method_mapping), "
        "layers/fused_moe/layer.py (assert isinstance(quant_method, FusedMoEMethodBase)), "
        "models/mindone_models/transformers.py (load_weights; mindspore 2.7.1: train/serialization.py, _type_convert)",
        _unsupported,
    ),
    Limit(
        "a linear of 4 bits that is no routed expert fails as its weights are prepared, which takes three dimensions",
        "mindformers 1.7.0: parallel_core/inference/quantization/golden_stick/a8dynw4.py "
        "(process_weights_after_loading)",
        _four_bits,
    ),
    Limit(
        f"with {_VARIABLE}=native",
        f"{_PLUGIN}/model_loader/utils.py (resolve_mix_backend_architecture: MindFormers first); "
        f"{_MINDFORMERS}/{{qwen2,glm4}}/modeling_*_infer.py (no get_quant_config)",
        _native,
    ),
)

RUNTIME = Runtime(
    name="vllm-mindspore",
    title="vLLM-MindSpore",
    version="0.5.1",
    summary="vLLM on Ascend, through MindSpore",
    reads=(
        Reads("float", limits=(_UNFOUND, _UNNORMED)),
        Reads(
            _FORMAT,
            {"quantization": "golden-stick"},
            _LIMITS,
            f"{_PLUGIN}/layers/quantization/golden_stick; {_MINDFORMERS}/{{deepseek3,qwen3}}/"
            "modeling_*_infer.py (get_quant_config), parallel_core/inference/quantization/golden_stick",
            frozenset({"DeepseekV3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}),
        ),
    ),
    hardware=("ascend",),
    plugin_of=VLLM.name,
    worker=VLLM.worker,
    # The plugin's own command line patches vLLM before it runs it.
    server=("vllm_mindspore.scripts", "serve"),
    servers=("vllm_mindspore.scripts", "serve"),
    first=("vllm_mindspore",),
    adapt=adapt,
    explain=explain,
)
