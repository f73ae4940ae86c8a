"""Quantized models of all formats."""

from tests.checkpoint.conftest import make_folder, quantize_folder

__all__ = ["make_folder", "quantize_folder"]
