"""What MindSpore 2.7.1's CPU backend lacks for MindOne's decoders, so that mindspore-gs runs on it unchanged.

Used on a CPU only: on Ascend nothing here is called. Installed packages stay as they are; the replacements live
in this process.
"""

from __future__ import annotations

from typing import Any


def provide() -> None:
    """Put the missing pieces in place, before any model is made."""
    from mindone.transformers.modeling_utils import MSPreTrainedModel
    from mindspore import Tensor, mint, ops, runtime

    runtime.launch_blocking()  # queues suit a device; here small operations take up to 40 times longer with them

    mint.arange = _arange  # kernel Arange
    mint.nn.Embedding.construct = lambda self, ids: ops.gather(self.weight, ids, 0)  # kernel Embedding
    mint.nn.functional.dropout = _no_dropout  # kernel DropoutExt, which is called even where it drops nothing
    Tensor.clone = Tensor.copy  # kernel Clone
    Tensor.masked_fill_ = lambda self, mask, value: self.copy_(self.masked_fill(mask, value))  # InplaceMaskedFillScalar
    ops.rms_norm = _rms_norm  # kernel RmsNorm
    MSPreTrainedModel.from_pretrained = classmethod(_in_float32(MSPreTrainedModel.from_pretrained.__func__))


def _arange(start: Any = 0, end: Any = None, step: Any = 1, *, dtype: Any = None) -> Any:
    """mint.arange by way of numpy."""
    import numpy as np
    from mindspore import Tensor

    if end is None:
        start, end = 0, start
    limits = [value.item() if isinstance(value, Tensor) else value for value in (start, end, step)]
    result = Tensor(np.arange(*limits))
    return result if dtype is None else result.astype(dtype)


def _rms_norm(x: Any, gamma: Any, epsilon: float = 1e-6) -> tuple[Any, Any]:
    """ops.rms_norm: the scaled x, and what it was scaled by."""
    from mindspore import ops

    factor = ops.rsqrt(x.pow(2).mean(-1, keep_dims=True) + epsilon)
    return gamma * (x * factor), factor


def _no_dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise ValueError("no dropout on a CPU: quantizing never trains")
    return x


def _in_float32(load: Any) -> Any:
    """`from_pretrained` in the one precision that has a matrix product here, without flash attention."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        import mindspore

        kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "_attn_implementation")}
        return load(cls, *args, **{**kwargs, "mindspore_dtype": mindspore.float32, "attn_implementation": "eager"})

    return from_pretrained
