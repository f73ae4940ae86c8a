"""FP8 weights with a scale per block, as DeepSeek-V3 and its successors are published: read as a float model."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.base import Format, quantization_method
from qtool.checkpoint.fp8 import METHOD
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


class Fp8(Format):
    name = METHOD
    title = "float8_e4m3fn with a scale per block"
    is_float = True

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) == METHOD

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        return None
