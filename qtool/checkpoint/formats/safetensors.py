"""A plain float model, as Hugging Face keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.common import Description, Format, Mode, Stored

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedLinear


class HuggingFaceFiles(Format):
    """File names that transformers and vLLM look for."""

    def shard_name(self, i: int, n: int) -> str:
        return "model.safetensors" if n == 1 else f"model-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return None if n == 1 else "model.safetensors.index.json"


class Safetensors(HuggingFaceFiles):
    name = "safetensors"

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        raise TypeError(f"{name}: a float model holds no quantized layers")

    def describe(self, names: Sequence[str], linears: Mapping[str, Mode], config: Mapping[str, Any]) -> Description:
        return Description(None, {})

    def mode(self, checkpoint: Checkpoint, name: str) -> Mode | None:
        return "float"

    def read(self, stored: Stored, mode: Mode) -> QuantizedLinear:
        raise TypeError(f"{stored.name}: a float model holds no quantized layers")

    def inputs(self, stored: Stored) -> tuple[float, int]:
        raise TypeError(f"{stored.name}: a float model holds no quantized layers")
