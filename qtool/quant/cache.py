"""Keys and values as they are kept in the cache: what calibration sees of them, scales, and what rounding leaves."""

from __future__ import annotations

from typing import Any

import torch

from qtool.quant.integer import asymmetric_parameters, symmetric_scale, to_grid
from qtool.quant.types import CacheScales, QuantizedCache
from qtool.scheme import QuantizationArgs


class CacheStatistics:
    """The range of each channel of keys and of values, [heads, width of a head] flattened.

    Attributes:
        keys, values: (low, high), float32 [channels] each; None before the first batch.
    """

    def __init__(self) -> None:
        self.keys: tuple[torch.Tensor, torch.Tensor] | None = None
        self.values: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a batch, each [samples, heads, length, width], and hand it back."""
        self.keys, self.values = _wider(self.keys, keys), _wider(self.values, values)
        return keys, values

    def __getstate__(self) -> dict[str, Any]:
        """In main memory: who unpickles it may have another device."""
        return {
            name: None if ends is None else tuple(end.cpu() for end in ends)
            for name, ends in (("keys", self.keys), ("values", self.values))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _wider(ends: tuple[torch.Tensor, torch.Tensor] | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.amin(dim=(0, 2)).flatten().float(), x.amax(dim=(0, 2)).flatten().float()
    return (low, high) if ends is None else (torch.minimum(ends[0], low), torch.maximum(ends[1], high))


def quantize_cache(
    statistics: CacheStatistics, args: QuantizationArgs, value_factors: torch.Tensor | None = None
) -> QuantizedCache:
    """Scales that hold everything that calibration saw, in main memory.

    Args:
        args: static, e4m3 or int8.
        value_factors: what smoothing multiplies each channel of the values by, float32 [channels]; positive.
    """
    assert statistics.keys is not None
    assert statistics.values is not None
    low, high = (end.cpu() for end in statistics.values)
    if value_factors is not None:
        low, high = low * value_factors.cpu(), high * value_factors.cpu()
    least, most = (end.cpu() for end in statistics.keys)
    return QuantizedCache(args, _scales(least, most, args), _scales(low, high, args))


def _scales(low: torch.Tensor, high: torch.Tensor, args: QuantizationArgs) -> CacheScales:
    if args.strategy == "tensor":
        low, high = low.amin()[None], high.amax()[None]
    if args.symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), args)
        return CacheScales(scale, torch.zeros_like(scale))
    return CacheScales(*asymmetric_parameters(low, high, args))


class CacheQuantizer:
    """What keys and values are after they were in the cache."""

    def __init__(self, cache: QuantizedCache) -> None:
        self._cache = cache

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors of the same shape, [samples, heads, length, width]."""
        return self._kept(keys, self._cache.keys), self._kept(values, self._cache.values)

    def _kept(self, x: torch.Tensor, scales: CacheScales) -> torch.Tensor:
        scale, zero_point = (
            each.to(x.device).view(-1, 1, x.shape[3]) if len(each) > 1 else each.to(x.device)
            for each in (scales.scale, scales.zero_point)
        )
        q = to_grid((x.float() / scale).add_(zero_point), self._cache.args)
        return q.sub_(zero_point).mul_(scale).to(x.dtype)
