"""The reference: transformers' own model code in one plain decoding loop."""

from __future__ import annotations

from qtool.runtimes.description import DECODING, Limit, Limitation, Quantized, Reads, Runtime


def _experts(model: Quantized) -> Limitation | None:
    routed = [name for name in model.schemes if ".experts." in name]
    if not routed or not any(scheme is not None for scheme in model.schemes.values()):
        return None
    return Limitation(
        "transformers doesn't load routed experts from a quantized checkpoint: quantized ones are an error, and float "
        "ones stay random",
        unread=True,
        hint="Run it in vLLM, or convert it: qtool convert --to bfloat16.",
    )


def _unknown(model: Quantized) -> Limitation | None:
    if model.architecture != "TeleChat2ForCausalLM":
        return None
    return Limitation("transformers has no TeleChat2", unread=True, hint="Run it in another runtime.")


RUNTIME = Runtime(
    name="transformers",
    title="transformers",
    version="5.19.0",
    summary="the reference: transformers' own models, one plain decoding loop",
    reads=(
        Reads("float"),
        Reads(
            "compressed-tensors",
            limits=(
                Limit(
                    "experts are one tensor there, and separate layers in the files: an error, or random weights",
                    "transformers 5.19.0: conversion_mapping.py, quantizers/quantizer_compressed_tensors.py",
                    _experts,
                ),
                Limit("no such model", "transformers 5.19.0: models/auto/configuration_auto.py", _unknown),
            ),
            source="transformers 5.19.0: quantizers/quantizer_compressed_tensors.py",
            caches=frozenset({"fp8"}),
        ),
    ),
    others=True,
    hardware=("cpu",),
    worker="qtool.runtimes.worker.transformers",
    sampling=DECODING,
    vllm=False,
)
