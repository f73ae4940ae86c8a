"""SGLang, which qtool doesn't start: what it reads is only told."""

from __future__ import annotations

from qtool.checkpoint.formats.targets import is_plain
from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime
from qtool.scheme import W8A8_DYNAMIC

_MATCHER = "sglang 0.5.23: srt/layers/quantization/compressed_tensors"


def _unknown(model: Quantized) -> Limitation | None:
    if model.architecture != "TeleChat2ForCausalLM":
        return None
    return Limitation("SGLang has no TeleChat2", unread=True)


def _experts(model: Quantized) -> Limitation | None:
    routed = [name for name, scheme in model.schemes.items() if scheme is not None and ".experts." in name]
    if not routed:
        return None
    return Limitation(
        f"{len(routed)} linears of routed experts are quantized to int8, which SGLang runs on Ascend alone", unread=True
    )


def _targets(model: Quantized) -> Limitation | None:
    found = {scheme for scheme in model.schemes.values() if scheme is not None}
    if not found or _unknown(model) or (found == {W8A8_DYNAMIC} and is_plain(model.schemes)) or _experts(model):
        return None
    return Limitation(
        "SGLang finds the quantized layers only of dense models that are dynamic int8 throughout",
        unread=True,
        hint="Quantize the original with --scheme w8a8-dynamic.",
    )


RUNTIME = Runtime(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    summary="SGLang on NVIDIA GPUs, which qtool doesn't start",
    reads=(
        Reads("float", limits=(Limit("no such model", "sglang 0.5.23: srt/models", _unknown),)),
        Reads(
            "compressed-tensors",
            limits=(
                Limit("no such model", "sglang 0.5.23: srt/models", _unknown),
                Limit(
                    "NotImplementedError: int8 experts are for Ascend only",
                    f"{_MATCHER}/compressed_tensors.py (get_moe_scheme)",
                    _experts,
                ),
                Limit(
                    "it looks for qkv_proj where targets name q_proj, k_proj and v_proj; so only Linear, the class, is "
                    "found, which is one scheme; static scales of fused layers are an IndexError",
                    f"{_MATCHER}/utils.py (find_matched_target); srt/layers/parameter.py",
                    _targets,
                ),
            ),
            source=f"{_MATCHER}/compressed_tensors.py, schemes/compressed_tensors_w8a8_int8.py",
        ),
    ),
    hardware=("cuda",),
    worker=None,
)
