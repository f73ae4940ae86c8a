"""A layer with int8 activations by the book, to compare runtimes with."""

from __future__ import annotations

import torch

from qtool.quant.types import QuantizedLinear


class FakeQuantized(torch.nn.Module):
    """A W8A8 or W4A8 layer in float arithmetic, as compressed-tensors runs it: its dynamic scale is max|x| / 127.5."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer
        scales = layer.weight_scale.reshape(len(layer.weight), -1)  # one, or one for each group of channels
        self.weight = layer.weight.float() * scales.repeat_interleave(layer.weight.shape[1] // scales.shape[1], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.input_scale is not None and self.layer.input_zero_point is not None:
            scale, offset = torch.tensor(self.layer.input_scale), self.layer.input_zero_point
        else:
            scale, offset = x.abs().amax(-1, keepdim=True) / 127.5, 0
        x = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
        bias = None if self.layer.bias is None else self.layer.bias.float()
        return torch.nn.functional.linear(x, self.weight, bias)
