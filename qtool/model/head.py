"""The end of a decoder: the final norm, and the output projection some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from qtool.model.loader import Loader, Quantizer, input_quantizer
from qtool.model.loop import DecoderLoop
from qtool.model.outside import Outside
from qtool.model.skeleton import Skeleton
from qtool.model.state import Batch
from qtool.model.textmodel import replaced
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

    def __init__(self, skeleton: Skeleton, loader: Loader, loop: DecoderLoop) -> None:
        self._skeleton, self._loader, self._loop = skeleton, loader, loop
        self._outside = Outside(skeleton, loader, loader.dtype)

    @property
    def vocabulary(self) -> int:
        """How many logits the model makes per token."""
        return self._shape[0]

    def leaving(self, batch: Batch) -> torch.Tensor:
        """What the output projection multiplies, [samples, length, hidden], of what the last layer left."""
        return self._loop.leaving(batch, self._loader.dtype)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same of hidden states [..., hidden], for a decoder that hands on nothing else."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.int64)
        return self.leaving(Batch(ids, (flat,))).reshape(hidden.shape)

    def rows(self, start: int, stop: int) -> HeadRows:
        """The rows of the output projection (which may be the embedding table again) that make logits start to stop."""
        loader, bias = self._loader, None
        if getattr(self._skeleton.head, "bias", None) is not None:
            name = loader.stored(f"{self._head_name}.bias")
            bias = loader.tensor(name, self._skeleton.head.get_parameter("bias").shape)[start:stop]
        loader.check(self._name, self._shape)
        if (linear := self._quantized) is not None:
            return HeadRows(loader.ready(linear.dequantize(start, stop)), bias, input_quantizer(linear))
        return HeadRows(loader.ready(loader.weights.rows(self._name, start, stop)), bias, None)

    def logits(self, hidden: torch.Tensor, rows: HeadRows) -> torch.Tensor:
        """Logits [tokens, rows] float32 of normalized hidden states [tokens, hidden], by the model's own code.

        Only its base model and output projection are replaced, so scaled and capped logits come out as it makes them.
        """
        made, head = _BaseOutput((hidden[None],)), self._skeleton.head
        inner = {self._skeleton.base: lambda *_a, **_k: made, self._skeleton.decoder: lambda *_a, **_k: made}
        with replaced(inner | {head: rows.project}), self._outside:
            logits: torch.Tensor = self._skeleton.model(inputs_embeds=hidden[None], use_cache=False).logits
            return logits[0].float()

    @cached_property
    def _head_name(self) -> str:
        return self._skeleton.name_of(self._skeleton.head)

    @property
    def _shape(self) -> torch.Size:
        return self._skeleton.head.get_parameter("weight").shape

    @cached_property
    def _name(self) -> str:
        """The checkpoint's."""
        return self._loader.stored(f"{self._head_name}.weight")

    @cached_property
    def _quantized(self) -> QuantizedLinear | None:
        return self._loader.weights.linear(self._name.removesuffix(".weight"))
