# mypy: disable-error-code="import-not-found"
"""Quantize with llm-compressor. Runs in its own environment: knows nothing of qtool.

usage: _llm_compressor.py MODEL TEXT SAMPLES SEQ_LEN OUTPUT [SCHEME [ROUNDING]]

SCHEME is w8a8 (SmoothQuant, activations per token; the default), w8a16, w4a16, w4a8 (weights in groups of 64, so that
widths of small models are whole groups) or fp8; +kv after it adds a float8 cache. ROUNDING is nearest (the default),
gptq or, for w4a16, awq (with zero points, as its own examples have it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(
    model_folder: str,
    text: str,
    samples: int,
    seq_len: int,
    output: str,
    scheme: str = "w8a8",
    rounding: str = "nearest",
) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][: samples * seq_len]
    if len(ids) < samples * seq_len:
        sys.exit(f"{text} has {len(ids)} tokens, {samples * seq_len} are needed")
    rows = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    # bfloat16 is several times slower on processors without AVX-512.
    fast = torch.cuda.is_available() or "AVX512" in torch.backends.cpu.get_cpu_capability()
    dtype = torch.bfloat16 if fast else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    # Experts become linears of their own. (Its load_quantizable_moe, which loads them so, needs torchvision.)
    linearize_moe(model)
    scheme, cache, _ = scheme.partition("+kv")
    smoothing: list[Any] = [SmoothQuantModifier(smoothing_strength=0.5)] if scheme in ("w8a8", "w4a8") else []
    if rounding == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        if not torch.cuda.is_available():  # 0.14.0.1 pins memory all the same, and torch refuses
            IntermediatesCache.pin_memory = lambda *args: None
        smoothing = [AWQModifier()]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * seq_len for _ in rows]}),
        recipe=[*smoothing, _modifier(scheme, rounding, bool(cache))],
        max_seq_length=seq_len,
        num_calibration_samples=samples,
    )
    quantized = {
        id(each) for module in model.modules() if hasattr(module, "quantization_scheme") for each in module.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


def _modifier(scheme: str, rounding: str, cache: bool) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    modifier = GPTQModifier if rounding == "gptq" else QuantizationModifier
    common: dict[str, Any] = {"ignore": ["lm_head", "re:.*mlp.gate$"]}
    if cache:
        common["kv_cache_scheme"] = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
    if scheme in ("w8a8", "fp8"):
        return modifier(targets="Linear", scheme={"w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}[scheme], **common)
    size = {"w8a16": {"strategy": "channel"}}.get(scheme, {"strategy": "group", "group_size": 64})
    bits = 8 if scheme == "w8a16" else 4
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if scheme == "w4a8" else None
    weights = QuantizationArgs(num_bits=bits, symmetric=rounding != "awq", **size)
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return modifier(config_groups={"group_0": group}, **common)


if __name__ == "__main__":
    if len(sys.argv) not in (6, 7, 8):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
