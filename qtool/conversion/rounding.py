"""What integers stand for, rounded to float8: a second rounding, of one layer at a time and without calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.quant.types import QuantizedLinear, dequantize
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_CHUNK = 1 << 22  # numbers at a time


@dataclass
class Change:
    """How much weights changed, all layers together.

    Attributes:
        error: sum of the squared differences.
        total: sum of the squared weights before.
    """

    error: float = 0.0
    total: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the differences, divided by that of the weights; 0 where nothing was rounded."""
        return math.sqrt(self.error / self.total) if self.total else 0.0


def to_float8(
    linear: QuantizedLinear, scheme: Scheme, storable: Callable[[torch.Tensor], torch.Tensor], change: Change
) -> QuantizedLinear:
    """A layer in another scheme, whose numbers are e4m3 codes. Some rows of it are floats at a time, never all.

    The largest weight that shares a scale becomes 448, as everywhere in qtool; each number goes to the nearest code.

    Args:
        linear: of any scheme. What its input was quantized with is dropped.
        scheme: of floating point, dynamic or with float activations.
        storable: rounds scales, float32 of any shape, to what the checkpoint format keeps of them.
        change: is added to.

    Raises:
        ValueError: `scheme` is another.
    """
    import torch

    from qtool.quant.integer import storage_dtype
    from qtool.quant.rounding.clipping import ScaleSearch
    from qtool.quant.rounding.nearest import round_to_nearest

    args = scheme.weights
    if args.type != "float" or args.strategy not in ("channel", "block") or scheme.is_static:
        raise ValueError(f"{scheme.label} needs calibration")
    search = ScaleSearch(args, (1.0,), None, storable)
    out, width = linear.shape
    numbers = torch.empty((out, width), dtype=storage_dtype(args))
    scales = torch.empty(args.scales_shape((out, width)))
    step = max(1, _CHUNK // max(1, width) // args.rows) * args.rows
    for start in range(0, out, step):
        stop = min(start + step, out)
        weight = linear.dequantize(start, stop)
        found = search.of_rows(weight)
        numbers[start:stop] = round_to_nearest(weight, found.scale, found.bound, args)
        scales[start // args.rows : -(-stop // args.rows)] = found.scale[:: args.rows]
        rest = dequantize(numbers[start:stop], found.scale, args).sub_(weight)
        change.error += float(rest.double().square_().sum())
        change.total += float(weight.double().square_().sum())
    return QuantizedLinear(scheme, numbers, scales, linear.bias)
