"""Parameters to compute with: found by the model's names, checked, dequantized, in one type, on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NoReturn

import torch

from qtool.errors import InputError
from qtool.model.names import Names
from qtool.model.skeleton import Skeleton
from qtool.model.weights import ModelWeights
from qtool.quant.integer import InputQuantizer
from qtool.quant.types import QuantizedLinear

Quantizer = Callable[[torch.Tensor], torch.Tensor]


class Loader:
    """Loads parameters of a model.

    Args:
        skeleton: of the model.
        weights: its tensors.
        dtype: to load them in, but for what the architecture wants in float32.
        device: to put them on.
    """

    def __init__(self, skeleton: Skeleton, weights: ModelWeights, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = weights
        self.dtype, self.device = dtype, device
        self._skeleton = skeleton

    @cached_property
    def names(self) -> Names:
        return Names(self._skeleton.model, self._skeleton.tensors, self.weights.names)

    def stored(self, name: str) -> str:
        """The checkpoint's name of a parameter of the model; `name` itself where there is no such tensor."""
        return self.names.stored(name)

    def parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A float tensor by the model's name, put together from several of the checkpoint where it is made of these.

        Args:
            dtype: to hand it out in, in place of the compute type.

        Raises InputError as `tensor`.
        """
        made = self.names.conversion(name)
        if not self._skeleton.tensors[name].is_floating_point():
            stored = self.stored(name)
            self.check(stored, shape)
            return self.weights.unchanged(stored).to(self.device)
        if made is None:
            return self.tensor(self.stored(name), shape, dtype)
        dtype = torch.float32 if self.is_kept_in_float32(name) else dtype or self.dtype
        parts = {part: [self.weights.tensor(each, dtype) for each in found] for part, found in made.parts.items()}
        tensor = made.convert(name, parts, self._skeleton.model)
        if tuple(tensor.shape) != tuple(shape):
            self._refuse_shape(name, tuple(tensor.shape), shape)
        return tensor.to(self.device)

    def rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of a table by the model's name and their numbers, int64 [n]. Raises InputError as `tensor`."""
        shape = tuple(self._skeleton.tensors[name].shape)
        if self.names.conversion(name) is not None:
            return self.parameter(name, shape, dtype)[ids.to(self.device)]
        stored = self.stored(name)
        self.check(stored, shape)
        return self.weights.gather(stored, ids).to(device=self.device, dtype=dtype or self.dtype)

    def is_kept_in_float32(self, name: str) -> bool:
        """Whether the architecture wants this parameter or buffer in float32 whatever the rest is in."""
        return any(part in name for part in self._skeleton.kept_in_float32)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A float tensor by the checkpoint's name. Raises InputError as `check`, and for NaN."""
        self.check(name, shape)
        dtype = torch.float32 if self.is_kept_in_float32(name) else dtype or self.dtype
        return self.weights.tensor(name, dtype).to(self.device)

    def linear(self, name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, Quantizer | None]:
        """A linear by the checkpoint's name without ".weight".

        Returns:
            (its float weight [out, in], what its input goes through when it is quantized).

        Raises:
            InputError: as `tensor`.
        """
        linear = self.weights.linear(name)
        if linear is None:
            return self.tensor(f"{name}.weight", shape), None
        self.check(f"{name}.weight", shape)
        return self.ready(linear.dequantize()), input_quantizer(linear)

    def ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the compute type, on the device."""
        return tensor.to(device=self.device, dtype=self.dtype)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError unless the checkpoint has a tensor of this name and shape."""
        if name not in self.weights:
            raise InputError(
                f"tensor {name} is missing",
                where=self.weights.where,
                hint="the checkpoint is incomplete or its config.json belongs to another model",
            )
        if self.weights.shape(name) != tuple(shape):
            self._refuse_shape(name, self.weights.shape(name), shape)

    def _refuse_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> NoReturn:
        raise InputError(
            f"tensor {name} has shape {list(found)}, config.json makes it {list(wanted)}",
            where=self.weights.where,
            hint="check that config.json belongs to these weights",
        )


def input_quantizer(linear: QuantizedLinear) -> Quantizer:
    """Fake quantization of what enters a quantized linear.

    Per token the scale is max|x| / 127.5 over integers -128..127, as in transformers with compressed-tensors and in
    qtool's own calibration; vLLM's int8 kernels take max|x| / 127, which rounds by another 0.4 % step.
    """
    return InputQuantizer.of(linear)
