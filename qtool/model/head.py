"""The end of a decoder: the final norm, and the output projection some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from qtool.model.loader import Loader, Quantizer, input_quantizer
from qtool.model.skeleton import Skeleton
from qtool.quant.types import QuantizedLinear


@dataclass(frozen=True)
class HeadRows:
    """Some rows of the output projection.

    Attributes:
        weight: [rows, hidden].
        bias: [rows] or None.
        quantize: what its input goes through when the projection is quantized.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    quantize: Quantizer | None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., rows]."""
        return nn.functional.linear(self.quantize(hidden) if self.quantize else hidden, self.weight, self.bias)


class _BaseOutput(tuple[torch.Tensor]):
    """What a base model returns; all that an architecture looks for besides hidden states (router logits) is None."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Head:
    """What comes after the decoder layers."""

    def __init__(self, skeleton: Skeleton, loader: Loader) -> None:
        self._skeleton, self._loader = skeleton, loader

    @property
    def vocabulary(self) -> int:
        """How many logits the model makes per token."""
        return self._shape[0]

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm on hidden states [..., hidden]."""
        norm = self._skeleton.norm
        if norm is None:
            return hidden
        weights = {
            key: self._loader.tensor(self._loader.stored(f"{self._skeleton.norm_name}.{key}"), parameter.shape)
            for key, parameter in norm.named_parameters()
        }
        return torch.func.functional_call(norm, weights, (hidden,))

    def rows(self, start: int, stop: int) -> HeadRows:
        """The rows of the output projection (which may be the embedding table again) that make logits start to stop."""
        loader, bias = self._loader, None
        if self._skeleton.head.bias is not None:
            name = loader.stored(f"{self._skeleton.head_name}.bias")
            bias = loader.tensor(name, self._skeleton.head.get_parameter("bias").shape)[start:stop]
        loader.check(self._name, self._shape)
        if (linear := self._quantized) is not None:
            return HeadRows(loader.ready(linear.dequantize(start, stop)), bias, input_quantizer(linear))
        return HeadRows(loader.ready(loader.weights.rows(self._name, start, stop)), bias, None)

    def logits(self, hidden: torch.Tensor, rows: HeadRows) -> torch.Tensor:
        """Logits [tokens, rows] float32 of normalized hidden states [tokens, hidden], by the model's own code.

        Only its base model and output projection are replaced, so scaled and capped logits come out as it makes them.
        """
        base, head = self._skeleton.base, self._skeleton.head
        made = _BaseOutput((hidden[None],))
        base.forward = lambda *_a, **_k: made
        head.forward = rows.project
        try:
            logits: torch.Tensor = self._skeleton.model(inputs_embeds=hidden[None], use_cache=False).logits
            return logits[0].float()
        finally:
            del base.__dict__["forward"], head.__dict__["forward"]

    @property
    def _shape(self) -> torch.Size:
        return self._skeleton.head.get_parameter("weight").shape

    @cached_property
    def _name(self) -> str:
        """The checkpoint's."""
        name = self._loader.stored(f"{self._skeleton.head_name}.weight")
        if self._skeleton.is_tied and name not in self._loader.weights:
            return self._loader.stored(f"{self._skeleton.embedding_name}.weight")
        return name

    @cached_property
    def _quantized(self) -> QuantizedLinear | None:
        return self._loader.weights.linear(self._name.removesuffix(".weight"))
