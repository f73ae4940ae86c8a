"""Float models, as Hugging Face keeps them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.base import Description, HuggingFaceFiles, quantization_method
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


class Plain(HuggingFaceFiles):
    name = "float"
    title = "float32, float16 or bfloat16 in safetensors"
    is_float = True

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) is None

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        return None

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        return Description(None, {})
