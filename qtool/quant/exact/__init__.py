"""OSL step for step as mindspore-gs 1.4.1's OutlierSuppressionLite does it, for one decoder layer in memory."""

from __future__ import annotations

from qtool.quant.exact.layer import quantize_layer

__all__ = ["quantize_layer"]
