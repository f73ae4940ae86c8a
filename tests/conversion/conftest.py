"""Quantized models of all formats."""

from tests.checkpoint.conftest import make_folder, quantize_folder
from tests.engines.conftest import quantize

__all__ = ["make_folder", "quantize", "quantize_folder"]
