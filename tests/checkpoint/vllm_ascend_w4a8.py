"""What vllm-ascend 0.23 makes of layers of 4 bits: python vllm_ascend_w4a8.py FOLDER OUT.npz

Prints a line of JSON as vllm_reads does. Reading, and what is done to the weights before the first token, are the
plugin's own. OUT has the matrices [..., in, out] that its kernels multiply by, by their documentation: int32 words of
eight int4, the first in the lowest bits, times a scale for each group, which experts have as the bits of a float32 in
an int64. It has the experts' `scale_bias` too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import vllm_ascend_on_cpu  # type: ignore[import-not-found]  # noqa: F401 (makes the plugin importable here)
import vllm_reads  # type: ignore[import-not-found]

import torch  # isort: skip

torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]


def main(folder: str, output: str) -> None:
    found: dict[str, Any] = {}

    def look(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            scheme = getattr(getattr(module, "quant_method", None), "quant_method", None)
            if scheme is None:
                continue
            if type(scheme).__name__ == "AscendW4A8DynamicLinearMethod":
                scheme.process_weights_after_loading(module)
                found[name] = _matrix(module.weight, module.weight_scale_second)
            elif type(scheme).__name__ == "AscendW4A8DynamicFusedMoEMethod":
                scheme.process_weights_after_loading(module)
                for part in ("w13", "w2"):
                    bits = getattr(module, f"{part}_weight_scale").numpy()
                    scale = torch.from_numpy(bits.astype(np.uint32).view(np.float32).reshape(bits.shape))
                    found[f"{name}.{part}"] = _matrix(getattr(module, f"{part}_weight"), scale)
                    found[f"{name}.{part}.bias"] = getattr(module, f"{part}_scale_bias").numpy()

    line = vllm_reads.read(folder, "ascend", look)
    np.savez(output, **found)
    print(json.dumps({"model": folder, **line}), flush=True)


def _matrix(words: torch.Tensor, scale: torch.Tensor) -> np.ndarray[Any, Any]:
    assert words.dtype == torch.int32
    fields = (words[..., None] >> torch.arange(0, 32, 4)) & 15
    integers = torch.where(fields > 7, fields - 16, fields).flatten(-2)
    group = integers.shape[-2] // scale.shape[-2]
    product: np.ndarray[Any, Any] = (integers * scale.float().repeat_interleave(group, dim=-2)).numpy()
    return product


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
