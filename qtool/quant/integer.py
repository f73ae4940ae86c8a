"""Quantization as `QuantizationArgs` describe it: scales, zero points, rounding.

Scales follow mindspore-gs 1.4.1: symmetric 2·max|w| / steps, asymmetric (max - min) / steps, computed
in float64 where the device has it, and used in float32 (an int8 has 255 steps). compressed-tensors takes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.quant.types import QuantizedLinear
from qtool.scheme import QuantizationArgs

_HAVE_FLOAT64 = ("cpu", "cuda")
_INPUTS = (
    ("int", "token", True, True),
    ("int", "token", True, False),
    ("int", "tensor", False, False),
    ("float", "token", True, True),
    ("float", "group", True, True),
)


def symmetric_scale(amax: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Scale of a symmetric range [-amax, amax].

    Args:
        amax: non-negative, any shape.

    Returns:
        float32, same shape; 1 where amax is 0 so that an all-zero row stays representable.
    """
    scale = (widened(amax) * 2 / args.steps).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def asymmetric_parameters(
    low: torch.Tensor, high: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a range [low, high], widened to hold 0.

    Returns:
        (scale float32, zero point float32 with integer values in qmin..qmax), same shape as the arguments;
        q = clamp(round(x / scale + zero point)).
    """
    low, high = widened(low).clamp(max=0), widened(high).clamp(min=0)
    scale = (high - low) / args.steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.round(args.qmin - low / scale).clamp(args.qmin, args.qmax)
    return scale.float(), zero_point.float()


def to_grid(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The numbers nearest to x that can be stored, in x's dtype and of its shape; x is overwritten."""
    if args.type == "float":
        return x.clamp_(args.qmin, args.qmax).to(torch.float8_e4m3fn).to(x.dtype)
    return x.round_().clamp_(args.qmin, args.qmax)


def storage_dtype(args: QuantizationArgs) -> torch.dtype:
    """What holds such numbers in memory."""
    return torch.float8_e4m3fn if args.type == "float" else torch.int8


def fake_quantize_tokens(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Each token or group of its channels by itself: over the last dimension (dynamic activations)."""
    if not args.symmetric:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        return fake_quantize_tensor(x, *asymmetric_parameters(low, high, args), args)
    if args.group_size is not None:
        width = x.shape[-1]
        padded = torch.nn.functional.pad(x, (0, -width % args.group_size)).unflatten(-1, (-1, args.group_size))
        return _fake_quantize_rows(padded, args).flatten(-2)[..., :width]
    return _fake_quantize_rows(x, args)


def _fake_quantize_rows(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    scale = symmetric_scale(x.abs().amax(dim=-1, keepdim=True), args)
    return to_grid(x / scale, args).mul_(scale)


def fake_quantize_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantizationArgs
) -> torch.Tensor:
    """Asymmetric, the whole tensor with a given scale and zero point (static activations)."""
    return (x / scale).add_(zero_point).round_().clamp_(args.qmin, args.qmax).sub_(zero_point).mul_(scale)


def widened(x: torch.Tensor) -> torch.Tensor:
    """In float64; in float32 on a device that has none."""
    return x.double() if x.device.type in _HAVE_FLOAT64 else x.float()


@dataclass(frozen=True)
class InputQuantizer:
    """Fake quantization of what enters a linear. Raises ValueError for ways to share a scale that it doesn't know.

    Attributes:
        args: per token and dynamic (floating point also per group of its channels, and symmetric); or integers per
            tensor, static and asymmetric; None leaves the input as it is.
        scale, zero_point: where it is static.
    """

    args: QuantizationArgs | None
    scale: float | None = None
    zero_point: int | None = None

    def __post_init__(self) -> None:
        args = self.args
        if args is None:
            return
        kind = (args.type, args.strategy, args.dynamic, args.symmetric)
        if kind not in _INPUTS:
            raise ValueError(f"activations that qtool can't quantize: {args}")
        if not args.dynamic and (self.scale is None or self.zero_point is None):
            raise ValueError("static activations without scale and zero point")

    @classmethod
    def of(cls, linear: QuantizedLinear) -> InputQuantizer:
        return cls(linear.scheme.activations, linear.input_scale, linear.input_zero_point)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape [..., in]; a new tensor unless it stays as it is."""
        if self.args is None:
            return x
        if self.scale is None or self.zero_point is None:
            return fake_quantize_tokens(x, self.args)
        scale, zero_point = torch.tensor(self.scale), torch.tensor(float(self.zero_point))
        return fake_quantize_tensor(x, scale.to(x.device), zero_point.to(x.device), self.args)
